"""What a rank keeps for backward at every kind of moment of a step, read off the orders that training runs. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from operator import ge

from megallama.config.schema import ParallelConfig, Schedule
from megallama.layout.schedules import Action, Kind, action_lists, schedule_of


@dataclass(frozen=True)
class Moment:
    """A rank in the midst of one computation, with what it keeps for each of its stages in the order of the model."""

    doing: Kind
    stage: int
    kept: tuple[int, ...]
    """Micro-batches from their forward to the weights' part of their backward, that of this computation included."""
    waiting: tuple[int, ...]
    """The micro-batches between the two parts of their backward."""


def fullest(parallel: ParallelConfig, micro_batches: int) -> tuple[tuple[Moment, ...], ...]:
    """For each pipeline rank the moments of a step that no other covers: memory peaks at one of them."""
    if parallel.pipeline == 1:
        return ((Moment("F", 0, (1,), (0,)), Moment("B", 0, (1,), (0,))),)
    count = enough(parallel, micro_batches)
    return _fullest(parallel.schedule, parallel.pipeline, parallel.chunks, count)


def enough(parallel: ParallelConfig, micro_batches: int) -> int:
    """The fewest micro-batches that fill every rank: a schedule repeats itself once it is in its stride.

    Interleaved1F1B goes in rounds; rounds that are longer than the pipeline make a schedule of their own.
    """
    if schedule_of(parallel).in_rounds and micro_batches % parallel.pipeline:
        return micro_batches
    return min(micro_batches, 4 * parallel.pipeline)


@cache
def _fullest(schedule: Schedule, ranks: int, chunks: int, micro_batches: int) -> tuple[tuple[Moment, ...], ...]:
    parallel = ParallelConfig(pipeline=ranks, schedule=schedule, chunks=chunks)
    return tuple(_uncovered(actions) for actions in action_lists(parallel, micro_batches))


def _uncovered(actions: list[Action]) -> tuple[Moment, ...]:
    place = {stage: index for index, stage in enumerate(sorted({action.stage for action in actions}))}
    kept, waiting = [0] * len(place), [0] * len(place)
    moments: dict[tuple[Kind, int, tuple[int, ...]], int] = {}
    for action in actions:
        at = place[action.stage]
        kept[at] += action.kind == "F"
        moments[action.kind, action.stage, (*kept, *waiting)] = sum(kept) + sum(waiting)
        kept[at] -= action.kind in "BW"
        waiting[at] += {"I": 1, "W": -1}.get(action.kind, 0)
    found: dict[tuple[Kind, int], list[tuple[int, ...]]] = {}
    for doing, stage, held in sorted(moments, key=moments.__getitem__, reverse=True):
        fuller = found.setdefault((doing, stage), [])  # what covers another has no less in sum, and was here before
        if not any(all(map(ge, other, held)) for other in fuller):
            fuller.append(held)
    count = len(place)
    return tuple(Moment(*doing, held[:count], held[count:]) for doing, all_of in found.items() for held in all_of)
