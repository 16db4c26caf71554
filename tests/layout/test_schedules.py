"""The orders that plans simulate are those that training runs: torch's own lists, action for action."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from torch import nn

from megallama.config.schema import ParallelConfig, Schedule
from megallama.layout.schedules import SCHEDULES, Action, action_lists, legal_micro_batches, stage_ranks
from megallama.train.pipeline import make_schedule


class Seat:
    """As much of a stage as a schedule looks at when it makes its lists: no process group, no module."""

    group_rank = 0

    def __init__(self, stage_index: int, num_stages: int, group_size: int) -> None:
        self.stage_index, self.num_stages, self.group_size = stage_index, num_stages, group_size
        self.is_first, self.is_last = stage_index == 0, stage_index == num_stages - 1
        self.submod = nn.Identity()
        self.stage_index_to_group_rank: dict[int, int] = {}


def trained(parallel: ParallelConfig, micro_batches: int) -> list[list[Action]]:
    """The lists that training runs, without waiting; a forward that is paired with a backward comes before it."""
    ranks = stage_ranks(parallel)
    seats = [Seat(stage, len(ranks), parallel.pipeline) for stage, rank in enumerate(ranks) if rank == 0]
    order = make_schedule(parallel, seats, action_lists(parallel, micro_batches)).pipeline_order
    return [flattened(order[rank]) for rank in range(parallel.pipeline)]


def flattened(order: list[Any]) -> list[Action]:
    found = []
    for action in order:
        parts: list[Any] = [] if action is None else list(action.sub_actions or [action])
        found += [
            Action(part.computation_type.value, part.stage_index, part.microbatch_index, part is not parts[-1])
            for part in parts
        ]
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"])
@pytest.mark.parametrize("pp", [2, 3, 4, 8])
def test_orders_are_those_of_training(schedule: Schedule, pp: int) -> None:
    compared = 0
    for chunks in (2, 3, 4) if schedule == "interleaved1f1b" else (2,):
        parallel = ParallelConfig(pipeline=pp, schedule=schedule, chunks=chunks)
        for micro_batches in (*range(1, 20), 24, 32, 64):
            if legal_micro_batches(parallel, micro_batches):
                ours, theirs = action_lists(parallel, micro_batches), trained(parallel, micro_batches)
                assert ours == theirs
                assert [[a.sent_with_next for a in rank] for rank in ours] == [
                    [a.sent_with_next for a in rank] for rank in theirs
                ]
                compared += 1
    assert compared > 0


def test_each_schedule_of_a_configuration_has_its_row() -> None:
    assert tuple(SCHEDULES) == get_args(Schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_row_says_what_its_lists_do(name: Schedule) -> None:
    row = SCHEDULES[name]
    lists = action_lists(ParallelConfig(pipeline=4, schedule=name), 16)
    stages = [{action.stage for action in actions} for actions in lists]
    assert [len(held) for held in stages] == [row.stages_per_rank or 2] * 4
    assert ({0, max(map(max, stages))} in stages) == row.v_shaped
    backwards = {action.kind for actions in lists for action in actions} - {"F"}
    assert backwards == {"never": {"B"}, "sometimes": {"B", "I", "W"}, "always": {"I", "W"}}[row.splits_backward]
