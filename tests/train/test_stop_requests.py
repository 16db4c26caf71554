"""When the clock asks a run to leave: in time for what it still has to save."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megallama.layout.topology import Topology
from megallama.parallel.clock import Clock
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ALONE, ParallelMesh
from megallama.train.stop_requests import StopDecision, StopRequests, _process_age

Make = Callable[[float], StopRequests]


@pytest.fixture
def requests(tmp_path: Path) -> Make:
    """Makes the requests of a run that has so many seconds left."""
    mesh = ParallelMesh(Topology(), 0, torch.device("cpu"), {}, ALONE, ALONE, ALONE, (), Clock(torch.device("cpu")))

    def make(seconds: float) -> StopRequests:
        return StopRequests(tmp_path, None, mesh, (_process_age() + seconds) / 60, 10**9, Launch())

    return make


def decided(run: StopRequests, *, saving: bool) -> StopDecision:
    """After a step that takes no time, of a run of one rank."""
    return run.decide(run.wishes(saving=saving, give_up=False))


@pytest.mark.parametrize(
    ("save_seconds", "saving", "leaves"), [(50.0, False, False), (50.0, True, True), (110.0, False, True)]
)
def test_a_run_leaves_while_there_is_time_to_save(
    save_seconds: float, saving: bool, leaves: bool, requests: Make
) -> None:
    """And while one is in flight, for that and the last."""
    run = requests(100.0)
    run.save_took(save_seconds)
    run.save_took(1.0)
    stop = decided(run, saving=saving).stop
    assert stop == ("train.max_minutes" if leaves else None)


def test_what_is_no_step_needs_no_time_before_the_end(requests: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As going back to a checkpoint, which takes half of the time that there is."""
    now = time.monotonic()
    run = requests(100.0)
    run.save_took(1.0)
    monkeypatch.setattr("megallama.train.stop_requests.time.monotonic", lambda: now)
    assert decided(run, saving=False).stop is None
    run.no_step()
    now += 60
    assert decided(run, saving=False).stop is None
    now += 60
    assert decided(run, saving=False).stop == "train.max_minutes"


def test_before_a_save_was_measured_a_disk_is_taken_to_be_slow(requests: Make) -> None:
    assert decided(requests(5.0), saving=False).stop == "train.max_minutes"
    assert decided(requests(20.0), saving=False).stop is None


def test_the_age_of_a_process_counts_from_before_its_first_import() -> None:
    script = "import time; time.sleep(1); from megallama.train.stop_requests import _process_age; print(_process_age())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1.0 < float(done.stdout) < _process_age()


@pytest.mark.parametrize(("age", "obeyed"), [(1.0, True), (-1.0, False)], ids=["since", "before"])
def test_a_stop_file_is_for_the_start_that_was_there_when_it_was_made(
    age: float, obeyed: bool, tmp_path: Path, requests: Make
) -> None:
    """Also when that was still importing: a launcher's trap may touch it at any time."""
    began = time.time() - _process_age()
    stop = tmp_path / "STOP"
    stop.touch()
    os.utime(stop, (began + age, began + age))
    run = requests(1000.0)
    assert stop.exists() is obeyed
    assert decided(run, saving=False).stop == ("the file STOP" if obeyed else None)
    assert not stop.exists()


def test_an_evaluation_is_left_out_when_the_time_left_is_for_the_save(requests: Make) -> None:
    """And not earlier: the time for it was left before."""
    run = requests(100.0)
    run.save_took(60.0)
    assert run.came(saving=False) is None is run.stop
    assert run.came(saving=True) == "train.max_minutes" == run.stop


def test_a_stop_that_was_heard_in_an_evaluation_is_followed_at_the_next_step(tmp_path: Path, requests: Make) -> None:
    run = requests(1000.0)
    (tmp_path / "STOP").touch()
    assert run.came(saving=False) == "the file STOP"
    assert not (tmp_path / "STOP").exists()
    assert run.came(saving=False) is None
    assert decided(run, saving=False).stop == "the file STOP"
