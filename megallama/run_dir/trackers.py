"""Weights & Biases and TensorBoard, which get the events of a run from threads of their own and never hold a step."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Protocol

from megallama.config.schema import RunConfig
from megallama.errors import UserError, printable
from megallama.run_dir.events import RETURNS, Event

WANDB_ID = "wandb_id"
"""In the run directory: what Weights & Biases knows the run by."""
TENSORBOARD = "tensorboard"
"""In the run directory: the folder of TensorBoard's files."""
_UPLOAD_SECONDS = 100.0
"""The time the end of a run waits for a network; what is not sent by then stays in the run directory."""
_END_SECONDS = 120.0
"""The time the end of a run waits for a tracker. One that has yet to give its network up, after 90 s, has it."""
_MOST_WAITING = 100_000
"""Events that wait for a tracker, 100 MB or so."""


class Tracker(Protocol):
    """What events go to; anything may be raised."""

    def write(self, event: Event) -> None: ...
    def close(self) -> None: ...


class InBackground:
    """A tracker in a thread of its own: one that is slow, hangs or fails holds and ends nothing.

    `make` makes it in that thread, as this may wait for a network.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name = name
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._lost = False
        self._thread = threading.Thread(target=self._serve, args=(make,), name=name, daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        if self._thread.is_alive() and not self._lost:
            self._events.put(event)
            if self._events.qsize() > _MOST_WAITING:
                self._lost = True
                _say(f"{self._name} takes nothing any more; the run goes on without")

    def close(self) -> None:
        self._events.put(None)
        self._thread.join(0.0 if self._lost else _END_SECONDS)
        if self._thread.is_alive() and not self._lost:
            _say(f"{self._name} has not answered in {_END_SECONDS:.0f} s; the run ends without")

    def leave(self) -> None:
        """Nothing to do in a process that ends at once."""

    def _serve(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
            while (event := self._events.get()) is not None:
                tracker.write(event)
            tracker.close()
        except Exception as error:
            _say_lost(self._name, error, "the run goes on without")


class Wandb:
    """Weights & Biases, of which all starts of a run are one run; mode offline needs neither network nor account.

    Weights & Biases counts rows, which never go back, and drops one that does. A step that is done again after a return
    is another row of the same `step`. `row` is the first that no start before has written.
    """

    NAME = "Weights & Biases"

    def __init__(self, config: RunConfig, run_dir: Path, row: int) -> None:
        assert config.logging.wandb is not None
        self._row = row
        self._run = _wandb_run(config, run_dir, config.logging.wandb.mode)

    def write(self, event: Event) -> None:
        if found := numbers(event):
            self._run.log({"step": event["step"], **found}, step=self._row)
        self._row += 1

    def close(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            _say_lost(self.NAME, error, "`wandb sync` sends what it did not get")


class TensorBoard:
    """Files of TensorBoard in `folder`, a new one for each start.

    A start, and a return to a checkpoint, takes the numbers of later steps out of what TensorBoard shows.
    """

    NAME = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        # A second of import that runs without it need not pay. The writer above this one has a thread of its own, which
        # prints a traceback when the disk is full.
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._writer = RecordWriter(self._file)
        self._record, self._begun = Record, SessionLog(status=SessionLog.START)
        self._write(file_version="brain.Event:2", wall_time=time.time())

    def write(self, event: Event) -> None:
        if event["event"] in RETURNS:
            # All of this step and after goes; a run that begins has none to keep.
            first = event["step"] + 1 if event["step"] else 0
            self._write(session_log=self._begun, step=first, wall_time=event["time"])
        values = [{"tag": tag, "simple_value": value} for tag, value in numbers(event).items()]
        if values:
            self._write(summary={"value": values}, step=event["step"], wall_time=event["time"])

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._record(**fields).SerializeToString())
        self._file.flush()


def numbers(event: Event) -> dict[str, float]:
    """What trackers show of an event, under names such as `train/loss`; nothing of a start, or without a step."""
    if "step" not in event or event["event"] == "start":
        return {}
    prefix = event["event"] if event["event"] != "eval" else f"eval/{event['split']}"
    values = [(key, value) for key, value in event.items() if not isinstance(value, dict)]
    for key, inner in event.items():
        values += [(f"{key}/{name}", value) for name, value in inner.items()] if isinstance(inner, dict) else []
    shown = ((key, value) for key, value in values if key not in ("step", "time"))
    return {f"{prefix}/{key}": value for key, value in shown if isinstance(value, int | float)}


def check_trackers(config: RunConfig) -> None:
    """UserError if a tracker lacks its package or its account; waits for no one at a prompt."""
    if config.logging.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "logging.tensorboard=true needs the package tensorboard, which is not installed; "
            "pip install 'megallama[tensorboard]', or use logging.tensorboard=false"
        )
    wanted = config.logging.wandb
    if wanted is None or wanted.mode == "offline":
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UserError(
            "logging.wandb.mode=online, but Weights & Biases has no key here; set WANDB_API_KEY, run `wandb login`, "
            "or use logging.wandb.mode=offline"
        )


def open_trackers(config: RunConfig, run_dir: Path, row: int) -> list[InBackground]:
    """Those that the configuration asks for; `row` as for `Wandb`."""
    found = []
    if config.logging.wandb is not None:
        found.append(InBackground(Wandb.NAME, lambda: Wandb(config, run_dir, row)))
    if config.logging.tensorboard:
        found.append(InBackground(TensorBoard.NAME, lambda: TensorBoard(run_dir / TENSORBOARD)))
    return found


def _wandb_run(config: RunConfig, run_dir: Path, mode: Literal["online", "offline"]) -> Any:
    """The run of wandb that the run in `run_dir` is, offline where there is no network."""
    import wandb  # a second of import that runs without it need not pay

    assert config.logging.wandb is not None
    wanted = config.logging.wandb
    # Its copy of what is printed would take each line of the panel through its process.
    settings = wandb.Settings(finish_timeout=_UPLOAD_SECONDS, console="off")
    try:
        run = wandb.init(
            project=wanted.project,
            name=wanted.name or run_dir.name,
            id=_wandb_id(run_dir),
            resume="allow",
            mode=mode,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:
        if mode == "offline":
            raise
        _say_lost(Wandb.NAME, error, "what it would get is written offline, for `wandb sync`")
        wandb.teardown()  # its process holds the id
        return _wandb_run(config, run_dir, "offline")
    return run


def _wandb_id(run_dir: Path) -> str:
    """The id of the run in `run_dir`, made by its first start."""
    path = run_dir / WANDB_ID
    found = path.read_text() if path.exists() else ""
    if not found:
        found = secrets.token_hex(4)
        path.write_text(found)
    return found


def _say_lost(name: str, error: Exception, instead: str) -> None:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    _say(f"{name} is not reached ({reason}); {instead}")


def _say(sentence: str) -> None:
    with suppress(OSError):
        print(f"megallama: {printable(sentence)}", file=sys.stderr)
