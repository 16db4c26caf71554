"""The batch of each step under train.batch_ramp, against a plain loop, and ramps that cannot run."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.load import dump_config, load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.budget import (
    Seen,
    batch_at,
    batches_to,
    planned_tokens,
    samples_at_step,
    schedule_steps,
    total_steps,
)
from megallama.layout.check import check_config
from megallama.train.lr_schedule import next_rate
from tests.plan.test_plan_command import CONFIGS


def ramped(stages: list[tuple[int, int | str]], last: int, *more: str) -> RunConfig:
    listed = ", ".join(f"{{global_batch_size: {batch}, until: {until}}}" for batch, until in stages)
    words = [f"train.batch_ramp=[{listed}]", f"train.global_batch_size={last}", *more]
    return load_config(CONFIGS / "quickstart.yaml", words)


def plain(stages: list[tuple[int, int]], last: int, length: int, samples: int) -> Iterator[tuple[int, int]]:
    """(position, batch) of each step from a position on, as anybody would write it down."""
    while True:
        batch = next((batch for batch, until in stages if samples * length < until), last)
        yield samples, batch
        samples += batch


@st.composite
def ramps(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    batches = sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=5)))
    untils = draw(st.sets(st.integers(1, 3000), min_size=len(batches) - 1, max_size=len(batches) - 1))
    return list(zip(batches, sorted(untils), strict=False)), batches[-1]


@settings(max_examples=200, deadline=None)
@given(
    ramp=ramps(), length=st.integers(1, 9), begin=st.integers(0, 400), step=st.integers(0, 50), more=st.integers(1, 900)
)
def test_positions_are_those_of_a_plain_loop(
    ramp: tuple[list[tuple[int, int]], int], length: int, begin: int, step: int, more: int
) -> None:
    config = ramped(
        *ramp, f"data.sequence_length={length}", "train.steps=null", f"train.tokens={(begin + more) * length}"
    )
    walked, positions = plain(*ramp, length, begin), []
    for position, batch in walked:
        assert batch_at(config, position) == batch
        assert samples_at_step(config, step + len(positions), Seen(step, begin)) == position
        if position >= begin + more:
            break
        positions.append((position, batch))
    assert total_steps(config, Seen(step, begin)) == step + len(positions)
    found = [batch for batch, steps in batches_to(config, begin + more, begin) for _ in range(steps)]
    assert found == [batch for _, batch in positions]


def test_llama_3_ramps_in_three_stages_that_are_found_at_once() -> None:
    """4M tokens, 8M after 252M, 16M after 2.87T (arXiv 2407.21783, section 3.4.1), in sequences of 8,192."""
    words = ["data.sequence_length=8192", "train.steps=null", "train.tokens=15.6T"]
    config = ramped([(512, "252M"), (1024, "2.87T")], 2048, *words)
    began = time.perf_counter()
    stages = list(batches_to(config, samples_at_step(config, total_steps(config))))
    assert time.perf_counter() - began < 0.1
    assert [batch * 8192 for batch, _ in stages] == [1 << 22, 1 << 23, 1 << 24]
    assert stages[0][1] == -(-252_000_000 // (1 << 22)) == 61
    assert [batch_at(config, samples) for samples in (60 * 512, 61 * 512)] == [512, 1024]
    assert 0 <= planned_tokens(config) - 15.6e12 < 1
    assert total_steps(config) == sum(steps for _, steps in stages) == 1_100_929


def test_a_length_in_steps_keeps_them_and_one_in_tokens_has_more_of_them() -> None:
    length = 128
    by_steps = ramped([(2, 40 * length)], 8, "train.steps=100")
    assert total_steps(by_steps) == 100
    assert planned_tokens(by_steps) == (20 * 2 + 80 * 8) * length == samples_at_step(by_steps, 100) * length
    by_tokens = ramped([(2, 40 * length)], 8, "train.steps=null", f"train.tokens={680 * length}")
    assert total_steps(by_tokens) == 100
    assert schedule_steps(by_tokens) == 340, "steps of `schedule` are those of the first batch"


def test_the_rate_goes_by_the_data_up_to_the_last_step_of_the_last_stage() -> None:
    words = ["train.steps=null", f"train.tokens={680 * 128}", "schedule.warmup_steps=10", "schedule.kind=linear"]
    config = ramped([(2, 40 * 128)], 8, *words, "schedule.min_lr=1e-5", "optimizer.lr=1e-3")
    rates = [next_rate(config, Seen(step, samples_at_step(config, step), 2)) for step in range(100)]
    assert rates[9] == pytest.approx(1e-3)
    assert rates[20] == pytest.approx(1e-3 - (1e-3 - 1e-5) * (48 - 20) / (680 - 20)), "48 sequences in"
    assert rates[-1] == pytest.approx(1e-5)


def test_a_ramp_survives_a_dump() -> None:
    config = ramped([(2, "1K"), (4, "2.5K")], 8)
    assert [stage.until for stage in config.train.batch_ramp] == [1000, 2500]
    assert "  - global_batch_size: 2\n    until: 1000\n" in dump_config(config)


STAGE = "a list of up to 64 stages such as [{global_batch_size: 64, until: 252M}]"
BAD = {
    "4": f"train.batch_ramp=4 is not legal; expected {STAGE}",
    "[4]": "train.batch_ramp[0]=4 is not legal; expected a mapping of keys",
    "[{global_batch_size: 4}]": "train.batch_ramp[0].until is missing; legal in train.batch_ramp[0]: "
    "global_batch_size, until",
    "[{global_batch_size: 4, until: 9, after: 3}]": "unknown key train.batch_ramp[0].after; legal in "
    "train.batch_ramp[0]: global_batch_size, until",
    "[{global_batch_size: 0, until: 9}]": "train.batch_ramp[0].global_batch_size=0 is not legal; expected at least 1",
    "[{global_batch_size: 4, until: soon}]": "train.batch_ramp[0].until=soon is not legal; expected a whole number of "
    "tokens up to 1e18, such as 300B, 1.5e9 or 3T",
    "[{global_batch_size: 2, until: 9}, {global_batch_size: 4, until: 9}]": "train.batch_ramp[1].until=9 is not more "
    "than the 9 of the stage before; nearest legal: train.batch_ramp[1].until=10",
    "[{global_batch_size: 8, until: 9}]": "train.batch_ramp[0].global_batch_size=8 is not less than "
    "train.global_batch_size=8, which follows; nearest legal: train.global_batch_size=9",
    "[{global_batch_size: 4, until: 9}, {global_batch_size: 3, until: 10}]": "train.batch_ramp[0].global_batch_size=4 "
    "is not less than train.batch_ramp[1].global_batch_size=3, which follows; nearest legal: "
    "train.batch_ramp[1].global_batch_size=5",
}


@pytest.mark.parametrize("ramp", BAD)
def test_a_bad_ramp_gets_one_sentence(ramp: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(CONFIGS / "quickstart.yaml", [f"train.batch_ramp={ramp}"])
    assert str(refused.value) == BAD[ramp]


PIPELINE = ["parallel.pipeline=2", "parallel.schedule=dualpipev", "model.num_hidden_layers=4"]
UNEVEN = [
    (
        [(6, 99), (12, 999)],
        16,
        ["train.micro_batch_size=4"],
        1,
        "[0].global_batch_size=6 ",
        "[0].global_batch_size=4 or 8, or train.micro_batch_size=2",
    ),
    (
        [(8, 99), (10, 999)],
        32,
        ["train.micro_batch_size=4"],
        2,
        "[1].global_batch_size=10 ",
        "[1].global_batch_size=16, or train.micro_batch_size=1",
    ),
    (
        [(2, 99), (4, 999)],
        16,
        ["train.micro_batch_size=4"],
        1,
        "[0].global_batch_size=2 ",
        " without [0], or train.micro_batch_size=2",
    ),
    ([(3, 99)], 8, ["train.micro_batch_size=1", *PIPELINE], 2, "[0].global_batch_size=3 ", "[0].global_batch_size=4"),
]


@pytest.mark.parametrize(("stages", "last", "words", "ranks", "refused", "legal"), UNEVEN)
def test_a_stage_that_is_no_number_of_micro_batches_is_named(
    stages: list[tuple[int, int | str]], last: int, words: list[str], ranks: int, refused: str, legal: str
) -> None:
    config = ramped(stages, last, *words)
    with pytest.raises(UserError) as found:
        check_config(config, ranks)
    assert str(found.value).startswith(f"train.batch_ramp{refused}is not a number of micro-batches of ")
    assert str(found.value).endswith(f"; nearest legal: train.batch_ramp{legal}")


def test_a_stage_that_is_over_fits_no_more_ranks() -> None:
    config = ramped([(2, 40 * 128)], 8, "train.micro_batch_size=2")
    with pytest.raises(UserError, match=r"batch_ramp\[0\]\.global_batch_size=2 is not a number"):
        check_config(config, 4, Seen(19, 38, 2))
    assert check_config(config, 4, Seen(20, 40, 2)).gradient_accumulation_steps == 1
