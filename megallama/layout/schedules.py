"""Pipeline schedules: the facts of each in one row, and what each rank computes in a step, in its order. Pure.

Training runs torch's lists for the three schedules that torch has; tests hold these against them, action for action.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from megallama.config.schema import ParallelConfig, Schedule

Kind = Literal["F", "B", "I", "W"]
"""Forward; backward whole, for the input alone, for the weights alone."""


@dataclass(frozen=True)
class Action:
    """One computation of a rank."""

    kind: Kind
    stage: int
    micro_batch: int
    sent_with_next: bool = field(default=False, compare=False)
    """Its result leaves the rank only after the action that follows it, as in the pairs of DualPipeV."""


@dataclass(frozen=True)
class ScheduleFacts:
    """What sets a pipeline schedule apart from the others."""

    actions: Callable[[int, int, int, int], list[Action]]
    """The list of a rank, by rank, ranks, stages of each rank and micro-batches."""
    least: Callable[[int], int]
    """The fewest micro-batches of a step, by ranks."""
    torch_name: str | None = None
    """The class of torch.distributed.pipelining whose lists training runs; without one it runs ours."""
    stages_per_rank: int | None = 1
    """None where `parallel.chunks` says it."""
    v_shaped: bool = False
    """Its stages run there and back, so that the first and the last are on one rank (arXiv 2401.10241, section 6)."""
    in_rounds: bool = False
    """Micro-batches go in rounds of equal size, of at least as many as there are ranks."""
    splits_backward: Literal["never", "sometimes", "always"] = "never"
    """Whether gradients of inputs and of weights are computed apart."""


def schedule_of(parallel: ParallelConfig) -> ScheduleFacts:
    """The row of the run's schedule. Without a pipeline every schedule is 1F1B's."""
    return SCHEDULES["1f1b" if parallel.pipeline == 1 else parallel.schedule]


def chunks(parallel: ParallelConfig) -> int:
    """Stages that each rank holds."""
    return schedule_of(parallel).stages_per_rank or parallel.chunks


def stage_ranks(parallel: ParallelConfig) -> list[int]:
    """The rank of each stage: round and round (arXiv 2104.04473), or there and back for a V."""
    there = list(range(parallel.pipeline))
    return there + there[::-1] if schedule_of(parallel).v_shaped else there * chunks(parallel)


def legal_micro_batches(parallel: ParallelConfig, count: int) -> bool:
    """Whether the schedule runs `count` micro-batches per optimizer step (torch.distributed.pipelining.schedules)."""
    row, pp = schedule_of(parallel), parallel.pipeline
    return count >= row.least(pp) and (not row.in_rounds or count % max(1, count // pp) == 0)


def action_lists(parallel: ParallelConfig, micro_batches: int) -> list[list[Action]]:
    """The list of each rank of the pipeline."""
    ranks, row = parallel.pipeline, schedule_of(parallel)
    return [row.actions(rank, ranks, chunks(parallel), micro_batches) for rank in range(ranks)]


class _List:
    """Actions of one rank; each kind takes the micro-batches of a stage in turn."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: Counter[tuple[str, int]] = Counter()
        self._weights: list[tuple[int, int]] = []

    def add(self, kind: Kind, stage: int, *, sent_with_next: bool = False) -> None:
        """The next micro-batch of the stage; the weights' part of an `I` waits for `add_weights`."""
        backward = "F" if kind == "F" else "I"
        micro_batch = self._next[backward, stage]
        self._next[backward, stage] += 1
        self.actions.append(Action(kind, stage, micro_batch, sent_with_next))
        if kind == "I":
            self._weights.append((stage, micro_batch))

    def add_pair(self, forward: int, backward: int) -> None:
        """A forward and a whole backward that overlap: what both make leaves after the second."""
        self.add("F", forward, sent_with_next=True)
        self.add("B", backward)

    def add_weights(self, *stages: int) -> None:
        """The weights' part that has waited longest, of any stage or of these, if one waits."""
        waiting = [pair for pair in self._weights if not stages or pair[0] in stages]
        if waiting:
            self._weights.remove(waiting[0])
            self.actions.append(Action("W", *waiting[0]))

    def count(self, kind: Kind, stage: int) -> int:
        """Micro-batches that have begun it."""
        return self._next["F" if kind == "F" else "I", stage]


def one_forward_one_backward(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """As many forwards as stages from here on, then backward and forward in turns (arXiv 2006.09503)."""
    found = _List()
    ahead = min(micro_batches, ranks - rank)
    for _ in range(ahead):
        found.add("F", rank)
    for done in range(micro_batches):
        found.add("B", rank)
        if ahead + done < micro_batches:
            found.add("F", rank)
    return found.actions


def interleaved(rank: int, ranks: int, per_rank: int, micro_batches: int) -> list[Action]:
    """1F1B in which a rank's chunks take turns, some micro-batches each (arXiv 2104.04473, section 2.2)."""
    rounds = max(1, micro_batches // ranks)
    in_turn = micro_batches // rounds
    total = micro_batches * per_rank
    ahead = min(total, (per_rank - 1) * in_turn + 2 * (ranks - 1 - rank))
    forward = [rank + ranks * (number // in_turn % per_rank) for number in range(total)]
    backward = [rank + ranks * (per_rank - 1 - number // in_turn % per_rank) for number in range(total)]
    found = _List()
    for number in range(ahead):
        found.add("F", forward[number])
    for number in range(total):
        if ahead + number < total:
            found.add("F", forward[ahead + number])
        found.add("B", backward[number])
    return found.actions


def zero_bubble_v(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """Stages in a V, each backward in two parts, the weights' where a rank would wait (arXiv 2401.10241, section 6)."""
    down, up = rank, 2 * ranks - 1 - rank
    count = max(2 * ranks - 1, micro_batches)
    found = _List()

    def backward(stage: int) -> None:
        found.add("I", stage)
        found.add_weights()

    for _ in range(2 * (ranks - rank) - 1):
        found.add("F", down)
    for _ in range(rank):
        found.add("F", up)
        found.add("F", down)
    for _ in range(ranks - rank):
        found.add("F", up)
        backward(up)
    while found.count("F", up) < found.count("F", down) or found.count("F", down) < count:
        if found.count("F", down) < count:
            found.add("F", down)
        backward(down)
        found.add("F", up)
        backward(up)
    for _ in range(rank):
        found.add("I", down)
        found.add("I", up)
    for _ in range(ranks - rank):
        found.add("I", down)
        found.add_weights(down)
    for stage in (up, down):
        for _ in range(count):
            found.add_weights(stage)
    return [action for action in found.actions if action.micro_batch < micro_batches]


def dual_pipe_v(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """Stages in a V, forwards paired with backwards of the other half (DeepSeek's DualPipeV, its eight steps)."""
    down, up = rank, 2 * ranks - 1 - rank
    after = ranks - rank - 1
    found = _List()
    for _ in range(2 * after):
        found.add("F", down)
    for _ in range(rank + 1):
        found.add("F", down)
        found.add("F", up)
    for _ in range(after):
        found.add("I", up)
        found.add_weights()
        found.add("F", up)
    for turn in range(micro_batches - 2 * ranks + rank + 1):
        if turn == 0 and after == 0:
            found.add("F", down)
            found.add("B", up)
        else:
            found.add_pair(down, up)
        found.add_pair(up, down)
    for _ in range(after):
        found.add("B", up)
        found.add_pair(up, down)
    # In the second half of what is left the weights' parts fill the gaps.
    half = (rank + 1) // 2
    for turn in range(rank + 1):
        found.add("I" if turn > half or (turn == half and rank % 2) else "B", up)
        found.add("I" if turn >= half else "B", down)
    for _ in range(after):
        found.add_weights()
        found.add("I", down)
    for _ in range(rank + 1):
        found.add_weights()
    return found.actions


SCHEDULES: dict[Schedule, ScheduleFacts] = {
    "1f1b": ScheduleFacts(
        actions=lambda rank, ranks, _, count: one_forward_one_backward(rank, ranks, count),
        least=lambda ranks: ranks,
    ),
    "interleaved1f1b": ScheduleFacts(
        actions=interleaved,
        least=lambda ranks: 1,
        torch_name="Interleaved1F1B",
        stages_per_rank=None,
        in_rounds=True,
    ),
    "dualpipev": ScheduleFacts(
        actions=lambda rank, ranks, _, count: dual_pipe_v(rank, ranks, count),
        least=lambda ranks: 2 * ranks,
        torch_name="DualPipeV",
        stages_per_rank=2,
        v_shaped=True,
        splits_backward="sometimes",
    ),
    "zbvzerobubble": ScheduleFacts(
        actions=lambda rank, ranks, _, count: zero_bubble_v(rank, ranks, count),
        least=lambda ranks: 2 * ranks - 1,
        torch_name="ZBVZeroBubble",
        stages_per_rank=2,
        v_shaped=True,
        splits_backward="always",
    ),
}
