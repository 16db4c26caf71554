"""Contenders that live in the same ranks and take turns, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch.distributed as dist
from torch import Tensor

from megallama.data.loader import MicroBatch

Step = Callable[[list[MicroBatch]], Tensor | float]
"""An optimizer step on a rank's micro-batches; a loss."""


@dataclass(frozen=True)
class Turns:
    """What a contender did on a rank."""

    seconds: list[list[float]]
    """Of each step of each round, from when all ranks begin to when all are done."""
    losses: list[float]

    @property
    def round_medians(self) -> list[float]:
        """Median seconds per step of each round."""
        return [median(seconds) for seconds in self.seconds]

    @property
    def all_seconds(self) -> list[float]:
        """Of all steps."""
        return [second for seconds in self.seconds for second in seconds]


def take_turns(
    contenders: Mapping[str, Step], batches: Callable[[], Iterator[list[MicroBatch]]], steps: int, rounds: int
) -> dict[str, Turns]:
    """`rounds` of so many steps of each, on the same micro-batches, after one that warms up."""
    found = {name: Turns([], []) for name in contenders}
    inputs = {name: batches() for name in contenders}
    for number in range(rounds + 1):
        # Back and forth: a machine that slows down steadily favours no one.
        for name in list(contenders) if number % 2 == 0 else list(reversed(contenders)):
            taken = []
            for _ in range(steps if number else 1):
                dist.barrier()
                began = time.perf_counter()
                loss = contenders[name](next(inputs[name]))
                dist.barrier()
                taken.append(time.perf_counter() - began)
                found[name].losses.append(float(loss))
            if number:
                found[name].seconds.append(taken)
    return found


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest relative one of losses."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))
