"""The layout search: what it finds trains, nothing that trains is missing, and every refusal has its reason."""

from __future__ import annotations

import time
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

import pytest
from pydantic import ValidationError

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import find_gpu
from megallama.layout.check import check_config
from megallama.layout.compiled import why_not_compiled
from megallama.layout.legal import divisors
from megallama.plan.memory.ledger import rank_bytes
from megallama.plan.report.search import POOR, SLOW, search_parts
from megallama.plan.report.time import speed
from megallama.plan.search.search import TIE, Candidate, Search, search
from megallama.plan.search.space import RECOMPUTE, schedules
from megallama.plan.time.software import machine
from megallama.plan.time.step_time import step_time

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = find_gpu("h100-80g")
LARGE = ("70b", "train.global_batch_size=24")
ODD = ("1b", "model.intermediate_size=5634", "model.tie_word_embeddings=true")
TRIED = schedules(32, 2)
"""Of the 7B in two stages: interleaved1f1b with 2, 3, 4, 8 and 16."""
Key = tuple[int, int, str, int, int, str, int]


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


@cache
def rejected_of(words: tuple[str, ...]) -> dict[str, Counter[str]]:
    return search(recipe(*words), 64, machine(H100)).rejected


@pytest.fixture(scope="module")
def small() -> Search:
    return search(recipe("7b"), 16, machine(H100))


def key_of(one: Candidate) -> Key:
    parallel, train = one.config.parallel, one.config.train
    sizes = parallel.tensor, parallel.pipeline, parallel.schedule, parallel.chunks
    return (*sizes, one.config.zero.stage, train.recompute, train.micro_batch_size)


def test_what_is_found_is_what_the_loader_takes_and_fits(small: Search) -> None:
    """Combinations of keys drawn at random, checked as training checks them."""
    expected, tried = set[Key](), set[Key]()
    every = list(product((1, 2, 4, 8), (1, 2, 4, 8, 16), TRIED, (1, 2, 3), RECOMPUTE, [1, 2, 4, 8, 16, 32, 64]))
    for tp, pp, (schedule, chunks), zero, again, size in Random(5).sample(every, 2500):
        if 16 % (tp * pp) or (pp == 1 and schedule != "1f1b") or (zero > 1 and tp * pp == 16) or pp * chunks > 32:
            continue  # another name of a layout that is among them, or none at all
        tried.add((tp, pp, schedule, max(2, chunks), zero, again, size))
        words = [f"parallel.tensor={tp}", f"parallel.pipeline={pp}", f"parallel.schedule={schedule}"]
        words += [f"zero.stage={zero}", f"train.recompute={again}", f"train.micro_batch_size={size}"]
        try:
            config = recipe("7b", *words, f"parallel.chunks={max(2, chunks)}")
            check_config(config, 16)
        except (UserError, ValidationError):
            continue
        if max(rank_bytes(config, 16)) <= H100.usable_bytes:
            expected.add((tp, pp, schedule, max(2, chunks), zero, again, size))
    found = {key_of(one) for one in small.found}
    assert len(found) == len(small.found)
    assert 50 < len(expected) < len(tried)
    assert found & tried == expected


def test_ties_come_first_the_simplest_of_them_before_the_others_and_then_the_fastest(small: Search) -> None:
    seconds = [one.seconds for one in small.found]
    tied, rest = small.found[: small.ties], seconds[small.ties :]
    assert 1 < small.ties < len(seconds)
    assert max(one.seconds for one in tied) <= (1 + TIE) * min(seconds) < rest[0]
    assert rest == sorted(rest)
    assert [one.complexity for one in tied] == sorted(one.complexity for one in tied)
    for one in (small.found[0], small.found[-1]):
        assert one.size == max(rank_bytes(one.config, 16))
    assert tied[0].seconds == step_time(tied[0].config, 16, machine(H100)).total


def test_what_insists_on_compiled_layers_is_given_no_layout_that_cannot_have_them() -> None:
    found = search(recipe("7b", "train.compile=true"), 16, machine(H100))
    assert found.found and all(why_not_compiled(one.config) is None for one in found.found)
    assert any("train.compile=true" in why for why in found.rejected)


def test_interleaving_is_tried_up_to_as_many_stages_as_a_rank_has_layers() -> None:
    assert [each for name, each in schedules(80, 4) if name == "interleaved1f1b"] == [2, 3, 4, 5, 10, 20]
    assert [each for name, each in schedules(32, 16) if name == "interleaved1f1b"] == [2]


def test_what_is_found_has_every_number_of_stages_that_its_layers_allow(small: Search) -> None:
    """The 7B has 32 layers, so up to 16 stages on each of two ranks and 2 on each of sixteen."""
    found: dict[int, set[int]] = {}
    for one in small.found:
        if one.config.parallel.schedule == "interleaved1f1b":
            found.setdefault(one.config.parallel.pipeline, set()).add(one.config.parallel.chunks)
    assert found == {2: {2, 3, 4, 8, 16}, 4: {2, 3, 4, 8}, 8: {2, 3, 4}, 16: {2}}


@pytest.mark.parametrize(
    ("words", "why", "where"),
    [
        (LARGE, "tp crosses the node of 8 GPUs", ["tp 16", "tp 32", "tp 64"]),
        (ODD, "pp has more stages than 22 layers", ["tp 1 pp 32", "tp 1 pp 64", "tp 2 pp 32"]),
        (LARGE, "more than 77.6 GiB", ["tp 1 pp 8"]),
        (LARGE, "1f1b cannot run so few micro-batches", ["tp 1 pp 32"]),
        (LARGE, "dp does not divide train.global_batch_size=24", ["tp 1 pp 1", "tp 1 pp 2", "tp 1 pp 4"]),
        (ODD, "tp does not divide 32 heads", ["tp 4", "tp 8"]),
        (ODD, "model.tie_word_embeddings=true with parallel.pipeline=8 under 1f1b puts", ["tp 1 pp 8"]),
    ],
)
def test_each_class_of_layouts_that_is_out_has_its_reason(words: tuple[str, ...], why: str, where: list[str]) -> None:
    rejected = rejected_of(words)
    assert any(set(where) <= set(found) for reason, found in rejected.items() if reason.startswith(why)), rejected


def test_every_layout_is_found_or_under_one_reason(small: Search) -> None:
    """Counted over, with sixteen GPUs in two nodes: what divides them, times schedules, stages and so on."""
    every = 0
    for tp, pp in product((1, 2, 4, 8, 16), repeat=2):
        if tp * pp <= 16:
            dp = 16 // (tp * pp)
            every += len(schedules(32, pp)) * (3 if dp > 1 and pp == 1 else 1) * 3 * 7
    assert small.tried == len(small.found) + sum(places.total() for places in small.rejected.values()) == every


def test_rejections_are_a_line_for_each_reason_and_their_places_are_explained(small: Search) -> None:
    for explain in (False, True):
        rejected = search_parts(small, machine(H100), 1e12, None, explain=explain)[1]
        assert [row.label for row in rejected.rows] == list(small.rejected)
        assert all(bool(row.how) == explain for row in rejected.rows)
    assert rejected.rows[0].how.startswith("tp 16: ")


BAD = {
    "a step of minutes": (("7b", "train.global_batch_size=65536"), 8, "Best of bad: a step takes "),
    "a copy without enough to do": (("8b", "train.global_batch_size=16"), 512, "Best of bad: an MFU of "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_best_that_nobody_would_run_says_why(case: str) -> None:
    words, gpus, begins = BAD[case]
    result = search(recipe(*words), gpus, machine(H100))
    note = search_parts(result, machine(H100), 1e12, None)[0].note
    assert begins in note, note
    assert words[1] in note, "it names the key"


def test_the_best_is_bad_above_ten_minutes_a_step_or_below_a_fifth_of_the_peak(small: Search) -> None:
    def note(config: RunConfig, seconds: float) -> str:
        only = Candidate(config, 16, seconds, small.found[0].size)
        return search_parts(Search([only], {}, 1), machine(H100), 1e12, None)[0].note

    config = small.found[0].config
    at_peak = small.found[0].seconds * speed(config, 16, H100, small.found[0].seconds).mfu_full
    assert (SLOW, POOR) == (600, 0.2)
    assert "Best of bad" not in note(config, at_peak / 0.201)
    assert "Best of bad: an MFU of 20%; " in note(config, at_peak / 0.199)
    assert "is matmul: the model is small for these GPUs." in note(config, at_peak / 0.199)
    large = recipe("7b", "train.global_batch_size=65536")
    assert "Best of bad" not in note(large, 599)
    assert "Best of bad: a step takes 10 minutes, since train.global_batch_size=65536 makes " in note(large, 601)
    assert "Best of bad" not in search_parts(small, machine(H100), 1e12, None)[0].note


def test_days_and_money_stand_beside_each_layout(small: Search) -> None:
    first = small.found[0]
    rows = search_parts(small, machine(H100), 1e12, 2.0)[0].rows
    days = -(-(10**12) // first.config.tokens_per_step) * first.seconds / 86_400
    assert f"{days:.3g} days, costs {2 * 16 * 24 * days:,.0f}" in rows[0].how
    assert not any("costs" in row.how for row in search_parts(small, machine(H100), 1e12, None)[0].rows)


def test_a_tie_is_said_to_be_one_and_a_lone_winner_is_not(small: Search) -> None:
    tied = search_parts(small, machine(H100), 1e12, None)[0].note
    assert 1 < small.ties <= 10 or tied.startswith(f"These are 10 of {small.ties} within 5% of the fastest, ")
    fastest = min(small.found, key=lambda one: one.seconds)
    assert f"The fastest is {fastest.name}, {fastest.seconds:.4g} s." in tied
    alone = Search(small.found, small.rejected, ties=1)
    assert search_parts(alone, machine(H100), 1e12, None)[0].note.startswith(
        f"{len(small.found):,} of {small.tried:,} layouts"
    )


def test_what_is_too_large_is_counted_by_place() -> None:
    """On four nodes of one GPU each, so that tp is 1; every layout on its own, as the search does not compute them."""
    lone = H100.model_copy(update={"gpus_per_node": 1})
    result = search(recipe("7b"), 4, machine(lone))
    large = Counter[str]()
    for pp in divisors(4):
        for (schedule, chunks), zero, again, size in product(
            schedules(32, pp), (1, 2, 3) if pp == 1 else (1,), RECOMPUTE, (1, 2, 4, 8, 16, 32, 64)
        ):
            words = ["parallel.tensor=1", f"parallel.pipeline={pp}", f"parallel.schedule={schedule}"]
            words += [f"zero.stage={zero}", f"train.recompute={again}", f"train.micro_batch_size={size}"]
            need = max(rank_bytes(recipe("7b", *words, f"parallel.chunks={max(2, chunks)}"), 4))
            large[f"tp 1 pp {pp}"] += need > H100.usable_bytes
    assert result.rejected["more than 77.6 GiB"] == +large


def test_a_config_that_no_layout_mends_is_refused_with_what_is_wrong_with_it() -> None:
    config = load_config(CONFIGS / "8b.yaml", ["train.steps=10", "schedule.warmup_steps=20"])
    with pytest.raises(UserError, match=r"is legal and fits; tp 1 pp 1: schedule\.warmup_steps=20 leaves") as refused:
        search(config, 16, machine(H100))
    assert "--gpus" not in str(refused.value), "other GPUs mend nothing"


def test_a_model_that_fits_nowhere_is_refused_with_what_is_missing() -> None:
    with pytest.raises(
        UserError,
        match=r"no layout of 8 h100-80g is legal and fits; the smallest, at tp 8 pp 1, needs 781\.\d GiB more",
    ):
        search(recipe("405b"), 8, machine(H100))


@pytest.mark.parametrize(("name", "gpus", "enough"), [("7b", 1, 2), ("70b", 8, 32), ("405b", 64, 128)])
def test_a_model_that_is_too_large_is_sent_to_the_first_doubling_that_holds_it(
    name: str, gpus: int, enough: int
) -> None:
    with pytest.raises(UserError, match=rf"needs [\d.]+ GiB more than 77\.6 GiB; try --gpus {enough}$"):
        search(recipe(name), gpus, machine(H100))
    assert search(recipe(name), enough, machine(H100)).found
    with pytest.raises(UserError, match=f"; try --gpus {enough}$"):
        search(recipe(name), enough // 2, machine(H100))


def test_no_gpus_are_named_where_no_doubling_holds_the_model() -> None:
    with pytest.raises(UserError, match=r"needs [\d.]+ GiB more than 77\.6 GiB$"):
        search(recipe("405b"), 1, machine(H100))


@pytest.mark.parametrize(
    ("words", "gpus", "near"),
    [
        (("7b", "train.global_batch_size=7"), 520, 504),
        (("7b", "train.global_batch_size=7"), 552, 560),
        (("7b", "train.global_batch_size=7"), 1200, 896),
        (("1b", "train.global_batch_size=1", "model.num_hidden_layers=3"), 64, 8),
    ],
)
def test_gpus_without_a_legal_layout_are_refused_with_the_nearest_that_have_one(
    words: tuple[str, ...], gpus: int, near: int
) -> None:
    config = recipe(*words)
    with pytest.raises(UserError, match=rf"; try --gpus {near}$"):
        search(config, gpus, machine(H100))
    assert search(config, near, machine(H100)).found


def test_gpus_that_fill_no_nodes_are_refused() -> None:
    with pytest.raises(UserError, match="--gpus=12 is no whole number of nodes of 8 h100-80g; whole nodes: 8 or 16"):
        search(recipe("1b"), 12, machine(H100))


def test_sixteen_thousand_gpus_are_searched_in_seconds() -> None:
    """5 s of a processor, that is; a clock on the wall also counts what else the machine does."""
    began = time.process_time()
    result = search(recipe("405b"), 16_384, machine(H100))
    assert time.process_time() - began < 5
    assert result.tried > 1000
    assert result.found[0].config.parallel.tensor == 8


def test_sequence_parallelism_stays_as_the_run_has_it() -> None:
    found = search(recipe("7b", "parallel.sequence=false"), 16, machine(H100)).found
    assert any(one.config.parallel.tensor > 1 for one in found)
    assert not any(one.config.parallel.sequence_parallel for one in found)
