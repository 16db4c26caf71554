"""How long steps take: on this rank, and where the time of all of them goes."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

from megallama.train.stragglers import Seconds, Stragglers

_RECENT = 8


class StepTimer:
    """Time spent in steps of one batch: evaluations and saves in between do not count.

    On a GPU the update is timed with what comes after it, the next step or, once in a while, an evaluation or a save.

    What all ranks spend it on goes to `ranks`, which begins anew.
    """

    def __init__(self, ranks: Stragglers) -> None:
        self._spent, self._steps, self._began = 0.0, 0, 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.steps = 0
        """All that were timed."""
        self.ranks = ranks
        ranks.begin()

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._began
        self._recent.append(seconds)
        self._spent += seconds
        self._steps += 1
        self.steps += 1

    def all_ranks(self, seconds: Seconds) -> None:
        """What all ranks spent their time on up to the step that was timed last."""
        if self.steps > 2:  # the step before the first was of another batch, and the first may have compiled
            self.ranks.add(seconds)

    def take(self) -> float:
        """Mean seconds per step since the last call."""
        mean, self._spent, self._steps = self._spent / self._steps, 0.0, 0
        return mean

    def typical(self) -> float:
        """Median seconds of the last eight steps."""
        return median(self._recent)
