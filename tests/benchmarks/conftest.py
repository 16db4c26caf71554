"""What bounds in seconds are counted in: the same command takes three times as long on some processors as on others."""

from __future__ import annotations

import time

import pytest

REFERENCE_SECONDS = 0.05


@pytest.fixture
def slowness() -> float:
    """How many times as long Python takes here as on a core that adds up a million squares in a twentieth of a second.

    1 at least: bounds are for such a core, and a faster one keeps them too.
    """
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        sum(number * number for number in range(10**6))
        taken.append(time.perf_counter() - began)
    return max(1.0, min(taken) / REFERENCE_SECONDS)
