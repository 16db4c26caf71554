"""How long a phase may take, and what ends a process in which no Python can run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megallama.train.watchdog import Watchdog

FACTOR, LEAST, FIRST = 4.0, 0.2, 30.0

LOCKED = """
import ctypes, sys
from pathlib import Path
import megallama.train.watchdog

megallama.train.watchdog._LOCKED_OUT_SECONDS = 1.0
watchdog = megallama.train.watchdog.Watchdog(Path(sys.argv[1]), print, 2.0, 0.5, 1.0)

def call_that_keeps_the_interpreter():
    ctypes.PyDLL(None).sleep(60)

watchdog.now("step")
call_that_keeps_the_interpreter()
"""


@pytest.fixture
def watchdog(tmp_path: Path) -> Iterator[Watchdog]:
    made = Watchdog(tmp_path / "stacks.txt", pytest.fail, FACTOR, LEAST, FIRST)
    yield made
    made.close()


def limit(watchdog: Watchdog, kind: str, *, patient: bool = False) -> float:
    """Seconds that a phase begun now may take."""
    watchdog.now(kind, patient=patient)
    assert watchdog._phase is not None
    return watchdog._phase.limit


def test_a_phase_may_take_a_multiple_of_the_recent_ones_of_its_kind(watchdog: Watchdog) -> None:
    assert limit(watchdog, "step") == FIRST
    for seconds in (0.1, 0.1, 0.4):
        time.sleep(seconds)
        watchdog.now("step")
    assert limit(watchdog, "step") == pytest.approx(FACTOR * 0.1, rel=0.2)
    assert limit(watchdog, "evaluation") == FIRST
    assert limit(watchdog, "evaluation") == LEAST
    assert limit(watchdog, "evaluation", patient=True) == FIRST


def test_a_hang_that_keeps_the_interpreter_is_ended_from_outside_it(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LOCKED, tmp_path / "stacks.txt"], capture_output=True, text=True)
    assert time.monotonic() - began < 20
    assert done.returncode == 1
    assert "call_that_keeps_the_interpreter" in done.stderr
    assert not (tmp_path / "stacks.txt").exists(), "no Python ran that could have written it"
