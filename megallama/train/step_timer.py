"""How long a step takes."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

_RECENT = 8


class StepTimer:
    """Time spent in steps alone: evaluations and saves in between do not count."""

    def __init__(self) -> None:
        self._spent, self._steps, self._began = 0.0, 0, 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.steps = 0
        """All that were timed."""

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._began
        self._recent.append(seconds)
        self._spent += seconds
        self._steps += 1
        self.steps += 1

    def take(self) -> float:
        """Mean seconds per step since the last call."""
        mean, self._spent, self._steps = self._spent / self._steps, 0.0, 0
        return mean

    def typical(self) -> float:
        """Median seconds of the last eight steps."""
        return median(self._recent)
