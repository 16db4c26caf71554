"""Where the time of all ranks goes, and which of them the others wait for."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from megallama.parallel.clock import SPANS, WORK

Seconds: TypeAlias = np.ndarray
"""[ranks, spans] of `megallama.parallel.clock.SPANS`."""
_WINDOW, _LEAST = 10, 5
"""Steps of which the median is taken, and the fewest that tell anything: a pause of the machine is no straggler."""
_BEHIND, _CAUGHT_UP = 0.1, 0.05
"""Of a step, by which a straggler is behind, and below which it is none any more: one near the bound is named once."""
_SLOWEST = 8
"""Ranks that an event names."""


class Stragglers:
    """The seconds of all ranks, step by step; `stages` are the pipeline ranks of the ranks.

    A rank is compared with the ranks of its pipeline stage, which have the same to do, by what it spends on work of its
    own, and a rank that is alone in its stage with its first steps. What it spends on waiting for others says nothing
    of it.
    """

    def __init__(self, stages: Sequence[int]) -> None:
        self._peers = [np.flatnonzero(np.array(stages) == stage) for stage in sorted(set(stages))]
        self._named: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """What is added from here on is of another batch; who was named is not named again for it."""
        self._since, self._steps = np.zeros(()), 0
        self._first: list[np.ndarray] = []
        self._behind: deque[np.ndarray] = deque(maxlen=_WINDOW)
        self._whole: deque[float] = deque(maxlen=_WINDOW)

    def add(self, seconds: Seconds) -> None:
        """Those of another step."""
        self._since, self._steps = self._since + seconds, self._steps + 1
        work = seconds[:, : len(WORK)].sum(1)
        if len(self._first) < _WINDOW:
            self._first.append(work)
        usual = np.median(self._first, axis=0)
        for peers in self._peers:
            if len(peers) > 1:
                usual[peers] = median_of_others(work[peers])
        self._behind.append(work - usual)
        self._whole.append(float(np.median(seconds.sum(1))))

    def take(self) -> Mapping[str, Any]:
        """Seconds of a step by span, the mean over ranks and steps since the last call, and who works longest.

        Nothing where no step was added.
        """
        if self._steps == 0:
            return {}
        seconds = self._since / self._steps
        self._since, self._steps = np.zeros(()), 0
        work = seconds[:, : len(WORK)].sum(1)
        slowest = np.argsort(-work, kind="stable")[:_SLOWEST]
        return {
            "breakdown": {name: float(mean) for name, mean in zip(SPANS, seconds.mean(0), strict=True) if mean > 0},
            "slowest": [[int(rank), float(work[rank])] for rank in slowest],
        }

    def new(self) -> list[tuple[int, float, float]]:
        """Ranks that have become stragglers since the last call: seconds behind in a step, and its share of one."""
        if len(self._behind) < _LEAST or len(self._behind[-1]) == 1:  # a rank that is all there is keeps nobody waiting
            return []
        # The lower median: between a step with the delay and one without lies half of it, which was never seen.
        behind = np.sort(self._behind, axis=0)[(len(self._behind) - 1) // 2]
        whole = float(np.median(self._whole))
        late, near = ({int(rank) for rank in np.flatnonzero(behind > part * whole)} for part in (_BEHIND, _CAUGHT_UP))
        new, self._named = sorted(late - self._named), late | (self._named & near)
        return [(rank, float(behind[rank]), float(behind[rank]) / whole) for rank in new]


def median_of_others(values: np.ndarray) -> np.ndarray:
    """[n] -> [n]: for each of two or more, the median of all but it."""
    order = np.argsort(values, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(values))
    ranked, others = values[order], len(values) - 1
    # Without what is at `place`, what was behind it moves up by one.
    lower, upper = ((middle + (place <= middle)) for middle in ((others - 1) // 2, others // 2))
    return (ranked[lower] + ranked[upper]) / 2
