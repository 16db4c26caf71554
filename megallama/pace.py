"""How long a step takes."""

from __future__ import annotations

import time


class Pace:
    """Time spent in steps alone: evaluations and saves in between do not count."""

    def __init__(self) -> None:
        self._spent, self._steps, self._began = 0.0, 0, 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._spent += time.perf_counter() - self._began
        self._steps += 1

    def take(self) -> float:
        """Mean seconds per step since the last call."""
        mean, self._spent, self._steps = self._spent / self._steps, 0.0, 0
        return mean
