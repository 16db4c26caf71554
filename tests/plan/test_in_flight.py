"""What is kept at the fullest moments of each schedule."""

from __future__ import annotations

import pytest

from megallama.config.schema import ParallelConfig, Schedule
from megallama.layout.schedules import legal_micro_batches
from megallama.plan.memory.in_flight import _fullest, enough, fullest

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble")


def most(parallel: ParallelConfig, micro_batches: int) -> list[int]:
    """Micro-batches kept by each rank, those of all its stages together."""
    return [max(sum(moment.kept) for moment in rank) for rank in fullest(parallel, micro_batches)]


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("more", [0, 1, 24])
def test_known_numbers(pp: int, more: int) -> None:
    """1F1B and its interleaved form: arXiv 2104.04473, section 2.2; the V shapes: arXiv 2405.15362."""
    count = 2 * pp + more
    assert most(ParallelConfig(pipeline=pp), count) == [pp - rank for rank in range(pp)]
    if count % pp == 0:
        interleaved = ParallelConfig(pipeline=pp, schedule="interleaved1f1b", chunks=3)
        assert most(interleaved, count) == [2 * pp + 2 * (pp - 1 - rank) + 1 for rank in range(pp)]
    assert most(ParallelConfig(pipeline=pp, schedule="zbvzerobubble"), count) == [2 * pp] * pp
    assert most(ParallelConfig(pipeline=pp, schedule="dualpipev"), count) == [2 * pp + 1] * pp


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4, 5, 8])
def test_a_schedule_in_its_stride_fills_no_rank_further(schedule: Schedule, pp: int) -> None:
    compared = 0
    for chunks in (2, 4) if schedule == "interleaved1f1b" else (2,):
        parallel = ParallelConfig(pipeline=pp, schedule=schedule, chunks=chunks)
        for count in (*range(4 * pp, 4 * pp + 9), 6 * pp, 16 * pp):
            if legal_micro_batches(parallel, count):
                whole = _fullest(schedule, pp, chunks, count)
                short = fullest(parallel, count)
                assert [set(rank) for rank in short] == [set(rank) for rank in whole]
                compared += enough(parallel, count) < count
    assert compared > 0
