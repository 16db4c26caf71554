"""A rank that others wait for is named with its delay, whichever axis they wait on; a run without one names none."""

from __future__ import annotations

import socket
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.parallel.clock import SPANS, Clock
from megallama.train.stragglers import Stragglers, median_of_others
from tests.launching import arguments, events, pretrain

DELAY = 1.0
"""Seconds of a step; steps of the same work differ by a tenth of a second here, where others compute as well."""
LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "dp2 zero1": (2, ["zero.stage=1"]),
    "dp2 zero2": (2, ["zero.stage=2"]),
    "dp2 zero3": (2, ["zero.stage=3"]),
    "tp2 pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}


EVERY = [*((name, "forward") for name in LAYOUTS), ("dp2 zero1", "data")]
IN_EVERY_RUN = [("tp2 pp2", "forward"), ("dp2 zero3", "forward"), ("dp2 zero1", "data")]


@pytest.mark.parametrize(
    ("name", "where"),
    [pytest.param(*case, marks=() if case in IN_EVERY_RUN else pytest.mark.layouts) for case in EVERY],
)
def test_a_slowed_rank_is_named_with_its_delay(name: str, where: str, byte_dataset: str, tmp_path: Path) -> None:
    ranks, layout = LAYOUTS[name]
    run, slow = tmp_path / "run", ranks - 1
    plant = partial(slowed, slow, where)
    words = arguments(byte_dataset, run, "train.steps=14", "train.micro_batch_size=1", *layout)
    assert pretrain(ranks, words, plant=plant) == [(0, "")] * ranks
    (found,) = (event for event in events(run, "straggler") if event["rank"] == slow)
    assert found["host"] == socket.gethostname()
    assert found["seconds"] == pytest.approx(DELAY, rel=0.2)
    late = [event for event in events(run, "train") if event["step"] > 3]
    slowest = [event["slowest"][0][0] for event in late]
    assert slowest.count(slow) > len(late) / 2, "the machine may hold up another once"
    spent = [event["breakdown"][where] for event in late]
    assert median(spent) >= DELAY / ranks, "the mean over ranks"


def slowed(rank: int, where: str) -> None:
    """In each step, `rank` sleeps where it reads its data, or in its first forward."""
    import megallama.train.loop

    train: Any = megallama.train.loop
    original, prefetched = train.train_step, train.prefetched

    def sleep(*_: Any) -> None:
        time.sleep(DELAY)

    def step(run: Any, *rest: Any) -> Any:
        handle = next(run.model.decoder_layers()).register_forward_pre_hook(lambda *_: (handle.remove(), sleep())[1])
        return original(run, *rest)

    def slow_data(loader: Any, samples: int) -> Any:
        for batches in prefetched(loader, samples):
            sleep()
            yield batches

    def patched(*given: Any) -> Any:
        import torch.distributed as dist

        if dist.get_rank() != rank:
            return prefetched(*given)
        if where == "forward":
            train.train_step = step
            return prefetched(*given)
        return slow_data(*given)

    train.prefetched = patched


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=2, max_size=9))
def test_the_median_of_the_others_leaves_each_out(values: list[float]) -> None:
    expected = [median(values[:place] + values[place + 1 :]) for place in range(len(values))]
    assert median_of_others(np.array(values)).tolist() == pytest.approx(expected)


def table(work: list[float]) -> np.ndarray:
    """Seconds of ranks that work so long in a step of ten seconds, and wait for the rest."""
    seconds = np.zeros((len(work), len(SPANS)))
    seconds[:, SPANS.index("forward")] = work
    seconds[:, SPANS.index("data_parallel")] = 10 - np.array(work)
    return seconds


def test_a_straggler_is_named_once_until_it_has_caught_up() -> None:
    ranks = Stragglers([0, 0, 0, 0])
    named = []
    for work in [[5, 5, 5, 5]] * 5 + [[5, 5, 8, 5]] * 20 + [[5, 5, 5, 5]] * 20 + [[5, 5, 8, 5]] * 20:
        ranks.add(table(work))
        named += ranks.new()
    assert named == [(2, 3.0, 0.3)] * 2


def test_a_rank_about_the_bound_is_named_once() -> None:
    ranks, named = Stragglers([0, 0, 0]), 0
    for work in ([5, 5, 6.1], [5, 5, 5.9]) * 20:
        for _ in range(10):
            ranks.add(table(work))
        named += len(ranks.new())
    assert named == 1


def test_one_slow_step_makes_no_straggler() -> None:
    ranks = Stragglers([0, 0])
    for work in [[5, 5]] * 5 + [[9, 5]] + [[5, 5]] * 5:
        ranks.add(table(work))
        assert ranks.new() == []


def test_ranks_are_compared_within_their_stage() -> None:
    ranks = Stragglers([0, 0, 1, 1])
    for _ in range(10):
        ranks.add(table([3, 3, 7, 9]))
    assert ranks.new() == [(3, 2.0, 0.2)]
    found = ranks.take()
    assert found["breakdown"] == {"forward": 5.5, "data_parallel": 4.5}
    assert found["slowest"] == [[3, 9.0], [2, 7.0], [0, 3.0], [1, 3.0]]
    assert ranks.take() == {}


def test_a_rank_alone_in_its_stage_is_compared_with_its_first_steps() -> None:
    ranks = Stragglers([0, 1])
    named = []
    for work in [[3, 7]] * 10 + [[3, 9]] * 10:
        ranks.add(table(work))
        named += ranks.new()
    assert named == [(1, 2.0, 0.2)]


def test_a_run_of_one_rank_has_no_straggler() -> None:
    ranks = Stragglers([0])
    for work in [[3]] * 10 + [[9]] * 10:
        ranks.add(table(work))
        assert ranks.new() == []


def test_another_batch_names_nobody_again() -> None:
    ranks = Stragglers([0, 0])
    named = []
    for _ in range(3):
        ranks.begin()
        for _ in range(10):
            ranks.add(table([5, 8]))
            named += ranks.new()
    assert named == [(1, 3.0, 0.3)]


def test_a_clock_counts_each_moment_once() -> None:
    clock = Clock(torch.device("cpu"))
    before = time.perf_counter()
    clock.take()
    began = time.perf_counter()
    with clock.span("forward"):
        time.sleep(0.02)
        with clock.span("tensor"):
            time.sleep(0.03)
    with clock.span("evaluation", whole=True), clock.span("tensor"):
        time.sleep(0.01)
    ended = time.perf_counter()
    found = dict(zip(SPANS, clock.seconds(clock.take()), strict=True))
    assert ended - began <= sum(found.values()) <= time.perf_counter() - before
    least = {"forward": 0.02, "tensor": 0.03, "evaluation": 0.01}
    assert all(found[name] >= seconds for name, seconds in least.items())
    assert sum(clock.seconds(clock.take())) <= time.perf_counter() - ended
