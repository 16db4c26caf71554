"""The learning rate at its endpoints, and its direction between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.schema import RunConfig, ScheduleConfig
from megallama.layout.budget import Seen, total_steps
from megallama.train.lr_schedule import learning_rate, next_rate

PEAK, FLOOR, STEPS, WARMUP = 3e-4, 3e-5, 100, 10
Kind = Literal["cosine", "linear", "wsd", "constant"]
KINDS: tuple[Kind, ...] = ("cosine", "linear", "wsd", "constant")


def rates(kind: Kind, steps: int = STEPS, warmup: int = WARMUP, decay: int | None = None) -> list[float]:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, min_lr=FLOOR, decay_steps=decay)
    return [learning_rate(step + 1, steps, PEAK, schedule) for step in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_rises_in_equal_steps_from_the_first_update_to_the_peak(kind: Kind) -> None:
    found = rates(kind)
    assert found[:WARMUP] == pytest.approx([PEAK * (step + 1) / WARMUP for step in range(WARMUP)])
    assert found[WARMUP - 1] == PEAK


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 10, 99])
def test_after_warmup_the_rate_never_rises_and_stays_within_its_bounds(kind: Kind, warmup: int) -> None:
    found = rates(kind, warmup=warmup)
    assert max(found) == PEAK
    assert all(after <= before for before, after in pairwise(found[max(0, warmup - 1) :]))
    assert min(found[warmup:]) >= FLOOR


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 98])
def test_the_last_step_has_exactly_min_lr_and_the_one_before_has_more(kind: Kind, warmup: int) -> None:
    found = rates(kind, warmup=warmup)
    assert found[-1] == FLOOR
    assert found[-2] > FLOOR


def test_without_warmup_the_first_step_has_the_peak() -> None:
    for kind in KINDS:
        assert rates(kind, warmup=0)[0] == PEAK
        assert rates(kind, steps=1, warmup=0) == [PEAK]


def test_cosine_is_half_way_down_half_way_through() -> None:
    found = rates("cosine", steps=101, warmup=1)
    assert found[50] == pytest.approx((PEAK + FLOOR) / 2)
    assert found[25] == pytest.approx(FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi / 4)) / 2)


def test_linear_falls_by_the_same_amount_each_step() -> None:
    falls = [before - after for before, after in pairwise(rates("linear")[WARMUP - 1 :])]
    assert falls == pytest.approx([(PEAK - FLOOR) / (STEPS - WARMUP)] * len(falls))


@pytest.mark.parametrize(("decay", "falling"), [(None, 10), (25, 25), (90, 90), (1, 1)])
def test_wsd_holds_the_peak_until_the_last_decay_steps(decay: int | None, falling: int) -> None:
    found = rates("wsd", decay=decay)
    assert found[WARMUP - 1 : STEPS - falling] == [PEAK] * (STEPS - falling - WARMUP + 1)
    falls = [before - after for before, after in pairwise(found[STEPS - falling - 1 :])]
    assert falls == pytest.approx([(PEAK - FLOOR) / falling] * falling)


def test_constant_holds_and_all_hold_past_the_end() -> None:
    assert rates("constant")[WARMUP:] == [PEAK] * (STEPS - WARMUP)
    for kind in KINDS:
        schedule = ScheduleConfig(kind=kind, warmup_steps=WARMUP, min_lr=FLOOR)
        assert learning_rate(STEPS + 6, STEPS, PEAK, schedule) == rates(kind)[-1]


SEQUENCE = 16


def by_tokens(kind: Kind, tokens: int, batch: int, **schedule: int) -> RunConfig:
    tiny = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return RunConfig.model_validate(
        {
            "model": tiny,
            "data": {"path": "corpus", "sequence_length": SEQUENCE},
            "train": {"tokens": tokens, "global_batch_size": batch},
            "optimizer": {"lr": PEAK},
            "schedule": {"kind": kind, "min_lr": FLOOR, **schedule},
        }
    )


def travelled(config: RunConfig, batches: Iterable[int]) -> list[tuple[int, float]]:
    """Sequences seen after each step, and its rate, over a run whose batches are `batches`, the last one for good."""
    seen, found, left = Seen(), [], iter(batches)
    while seen.step < total_steps(config, seen):
        batch = next(left, config.train.global_batch_size)
        config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": batch})})
        rate = next_rate(config, seen)
        seen = Seen(seen.step + 1, seen.samples + batch, seen.first_batch or batch)
        found.append((seen.samples, rate))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3, 7, 192, 2**20])
@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 7}, {"warmup_steps": 13, "decay_steps": 60}])
def test_a_length_in_tokens_has_the_rates_of_its_steps_to_the_bit(
    kind: Kind, batch: int, schedule: dict[str, int]
) -> None:
    config = by_tokens(kind, STEPS * batch * SEQUENCE - 5, batch, **schedule)
    steps = rates(kind, warmup=config.schedule.warmup_steps, decay=config.schedule.decay_steps)
    assert travelled(config, []) == [(batch * (step + 1), rate) for step, rate in enumerate(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@given(
    samples=st.integers(200, 3000),
    warmup=st.integers(0, 9),
    decay=st.one_of(st.none(), st.integers(1, 11)),
    first=st.integers(1, 10),
    changes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_batches_the_rate_falls_to_min_lr_at_the_step_that_reaches_the_tokens(
    kind: Kind, samples: int, warmup: int, decay: int | None, first: int, changes: list[tuple[int, int]]
) -> None:
    more = {} if decay is None else {"decay_steps": decay}
    config = by_tokens(kind, samples * SEQUENCE, first, warmup_steps=warmup, **more)
    batches = [first, *(batch for batch, steps in changes for _ in range(steps))]
    found = travelled(config, batches)
    assert found[-2][0] < samples <= found[-1][0]
    assert found[-1][1] == FLOOR
    assert max(rate for _, rate in found) <= PEAK
    after = [rate for seen, rate in found if seen > warmup * first]
    if kind != "wsd" or decay is not None:  # a tenth of the run is of whole steps, and may change by one of them
        assert all(later <= earlier for earlier, later in pairwise(after))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_larger_batch_leaves_the_rate_where_it_is_in_the_data(kind: Kind) -> None:
    """Warm-up and fall alike: after as many sequences the rate is that of the undisturbed run."""
    config = by_tokens(kind, 404 * SEQUENCE, 2, warmup_steps=20)
    undisturbed = dict(travelled(config, []))
    for changed in (10, 106):  # in warm-up, and in the fall
        found = travelled(config, [2] * changed + [8] * 100)
        assert len(found) < len(undisturbed)
        assert {seen: pytest.approx(rate) for seen, rate in found}.items() <= undisturbed.items()
