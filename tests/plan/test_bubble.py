"""The closed forms of waiting are what the simulation of the lists that training runs gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import ParallelConfig, RunConfig, Schedule
from megallama.layout.schedules import Kind, action_lists, legal_micro_batches, stage_ranks
from megallama.plan.time.simulation import bubble, simulate, waiting

CONFIG = Path(__file__).parents[2] / "configs" / "debug.yaml"


def config_of(parallel: ParallelConfig) -> RunConfig:
    return load_config(CONFIG).model_copy(update={"parallel": parallel})


UNITS: dict[Kind, int] = {"F": 1, "B": 2, "I": 1, "W": 1}


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"])
@pytest.mark.parametrize("pp", [2, 3, 4, 5, 8])
def test_waiting_is_that_of_the_simulated_lists(schedule: Schedule, pp: int) -> None:
    compared = 0
    for per_rank in (2, 3, 4) if schedule == "interleaved1f1b" else (2,):
        parallel = ParallelConfig(pipeline=pp, schedule=schedule, chunks=per_rank)
        times = {
            (kind, stage): float(unit) for stage in range(len(stage_ranks(parallel))) for kind, unit in UNITS.items()
        }
        for micro_batches in (*range(1, 19), 24, 32):
            if legal_micro_batches(parallel, micro_batches):
                share = bubble(simulate(action_lists(parallel, micro_batches), times))
                expected = share / (1 - share)
                assert waiting(config_of(parallel), micro_batches) == pytest.approx(expected)
                compared += 1
    assert compared > 0


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"])
def test_one_rank_does_not_wait(schedule: Schedule) -> None:
    assert waiting(config_of(ParallelConfig(schedule=schedule)), 3) == 0
