"""Trackers in threads of their own: what is slow, hangs or fails there holds nothing and is said once."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megallama.run_dir import trackers
from megallama.run_dir.events import Event
from megallama.run_dir.trackers import InBackground, TensorBoard, numbers

FULL_DISK = """
import resource, sys
from pathlib import Path
from megallama.run_dir.trackers import InBackground, TensorBoard

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
board = InBackground(TensorBoard.NAME, lambda: TensorBoard(Path(sys.argv[1])))
for step in range(1000):
    board.write({"event": "train", "time": 0.0, "step": step, "loss": 1.0})
board.close()
print("ended")
"""


class Stuck:
    """A tracker that takes its first event and does not come back before it is let go."""

    def __init__(self) -> None:
        self.taken, self.free = threading.Event(), threading.Event()
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)
        self.taken.set()
        self.free.wait()

    def close(self) -> None:
        self.events.append({"event": "closed"})


def train(step: int, loss: float, time: float = 0.0) -> Event:
    return {"event": "train", "time": time, "step": step, "loss": loss}


def test_one_that_hangs_holds_neither_a_step_nor_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_END_SECONDS", 0.01)
    stuck = Stuck()
    tracker = InBackground("stuck", lambda: stuck)
    tracker.write(train(1, 1.0))
    stuck.taken.wait()
    for step in range(2, 100):
        tracker.write(train(step, 1.0))
    tracker.close()
    assert [event["step"] for event in stuck.events] == [1]
    assert capsys.readouterr().err == "megallama: stuck has not answered in 0 s; the run ends without\n"
    stuck.free.set()


def test_what_waited_arrives_in_order_before_the_end() -> None:
    stuck = Stuck()
    tracker = InBackground("slow", lambda: stuck)
    for step in range(1, 100):
        tracker.write(train(step, 1.0))
    stuck.taken.wait()
    stuck.free.set()
    tracker.close()
    assert [event.get("step") for event in stuck.events] == [*range(1, 100), None]


def test_one_that_takes_nothing_for_too_long_is_given_up_and_fills_no_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_MOST_WAITING", 10)
    stuck = Stuck()
    tracker = InBackground("stuck", lambda: stuck)
    for step in range(1, 100):
        tracker.write(train(step, 1.0))
    assert tracker._events.qsize() <= 11
    tracker.close()
    assert capsys.readouterr().err == "megallama: stuck takes nothing any more; the run goes on without\n"
    stuck.free.set()


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "board")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "ended\n"
    said = "megallama: TensorBoard is not reached ([Errno 27] File too large); the run goes on without\n"
    assert done.stderr == said


def test_a_start_takes_the_numbers_after_it_back(tmp_path: Path) -> None:
    """One that begins anew, having been killed before its first checkpoint, takes all."""
    begun = {"event": "start", "step": 0, "time": 1.0, "parameters": 7}
    starts = [
        [begun, train(0, 7.0), train(1, 5.0), train(2, 4.0)],
        [begun, train(0, 6.0), train(1, 3.0), train(2, 2.0), train(3, 1.0)],
        [{"event": "resume", "step": 2, "time": 1.0}, {**begun, "step": 2}, train(3, 0.5, time=9.0)],
    ]
    for events in starts:
        board = TensorBoard(tmp_path)
        for event in events:
            board.write(event)
        board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(each.step, each.value) for each in found.Scalars("train/loss")] == [
        *((0, 6.0), (1, 3.0), (2, 2.0), (3, 0.5))
    ]
    assert found.Scalars("train/loss")[-1].wall_time == 9.0
    assert found.Tags()["scalars"] == ["train/loss"]


def test_numbers_have_the_names_of_their_events() -> None:
    event = {"event": "train", "time": 1.0, "step": 3, "loss": 2.0, "path": "x", "source_tokens": {"web": 7}}
    assert numbers(event) == {"train/loss": 2.0, "train/source_tokens/web": 7}
    assert numbers({"event": "eval", "step": 3, "split": "web", "loss": 2.0}) == {"eval/web/loss": 2.0}
    assert numbers({"event": "notice", "text": "x"}) == {}
