"""How long a phase may take, and what ends a process in which no Python can run."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.flight_recorder.components.loader import read_dir

import megallama.train.watchdog
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


HANGS = """
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from megallama.parallel.join import join
from megallama.parallel.launch import Launch
from megallama.train.watchdog import Watchdog

def ask_for_a_sum(device):
    dist.all_reduce(torch.ones(3, 5, device=device))

device = torch.device(sys.argv[2])
join(Launch(), device)
ask_for_a_sum(device)
watchdog = Watchdog(Path(sys.argv[1]), print, 2.0, 0.5, 1.0)
watchdog.now("step")
time.sleep(60)
"""


class Clock:
    """What the watchdog takes for the time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(megallama.train.watchdog, "time", made)
    return made


@pytest.fixture
def watchdog(tmp_path: Path, clock: Clock) -> Iterator[Watchdog]:
    made = Watchdog(tmp_path / "stacks.txt", pytest.fail, FACTOR, LEAST, FIRST)
    yield made
    made.close()


def limit(watchdog: Watchdog, kind: str, *, patient: bool = False) -> float:
    """Seconds that a phase begun now may take."""
    watchdog.now(kind, patient=patient)
    assert watchdog._phase is not None
    return watchdog._phase.limit


def test_a_phase_may_take_a_multiple_of_the_recent_ones_of_its_kind(watchdog: Watchdog, clock: Clock) -> None:
    assert limit(watchdog, "step") == FIRST
    for seconds in (1.0, 1.0, 3.0):
        clock.now += seconds
        watchdog.now("step")
    assert limit(watchdog, "step") == FACTOR * 1.0
    assert limit(watchdog, "evaluation") == FIRST
    assert limit(watchdog, "evaluation") == LEAST
    assert limit(watchdog, "evaluation", patient=True) == FIRST


def test_a_hang_that_keeps_the_interpreter_is_ended_from_outside_it(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LOCKED, tmp_path / "stacks.txt"], capture_output=True, text=True)
    assert time.monotonic() - began < 50, "the call would return after 60 s"
    assert done.returncode == 1
    assert "call_that_keeps_the_interpreter" in done.stderr
    assert not (tmp_path / "stacks.txt").exists(), "no Python ran that could have written it"


def test_a_hang_ends_where_no_stacks_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "stacks").touch()
    words = [sys.executable, "-c", HANGS, tmp_path / "stacks" / "rank_00003.txt", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Timeout" not in done.stderr, "it is not for `faulthandler`, a minute later"
    assert re.search(r"step hangs: \d+ s, where 1 s is the most it may take; stacks cannot be written to ", done.stderr)


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "gloo"),
        pytest.param(
            "cuda:0",
            "nccl",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
            ],
        ),
    ],
)
def test_the_last_collectives_are_written_beside_the_stacks(device: str, backend: str, tmp_path: Path) -> None:
    stacks = tmp_path / "stacks" / "rank_00003.txt"
    done = subprocess.run([sys.executable, "-c", HANGS, stacks, device], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    said = rf"step hangs: \d+ s, where 1 s is the most it may take; stacks are in {re.escape(str(stacks))}"
    assert re.search(said, done.stderr), done.stderr
    assert {path.name for path in stacks.parent.iterdir()} == {"rank_00003.txt", "collectives_rank_00003"}
    of_rank, _ = read_dir(Namespace(trace_dir=str(stacks.parent), prefix=None))  # as torchfrtrace does
    assert of_rank["collectives_rank_00003"]["rank"] == 3
    (entry,) = of_rank["collectives_rank_00003"]["entries"]
    assert entry["profiling_name"] == f"{backend}:all_reduce"
    assert entry["input_sizes"] == [[3, 5]]
    assert "ask_for_a_sum" in [frame["name"] for frame in entry["frames"]]
