"""The file metrics.jsonl of a run: how its lines are written, and which stand after the run went back. No torch.

Whoever reads the metrics of a run takes `standing_events`: a run that goes back to a checkpoint trains the steps after
it once more, and their lines of before are still in the file.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megallama.errors import UserError

METRICS = "metrics.jsonl"
"""In the run directory."""
RETURNS = "resume", "rollback", "rewind", "start"
"""Events at whose step the run stands again: what came after it before is undone."""

_OF_A_STEP = *RETURNS, "train", "eval", "checkpoint", "checkpoint_failed"

Event = dict[str, Any]


class Sink(Protocol):
    """Where events go."""

    def write(self, event: Event) -> None: ...
    def close(self) -> None: ...
    def leave(self) -> None: ...


def event_now(kind: str, **values: Any) -> Event:
    """An event with its time, in Unix seconds to the millisecond."""
    return {"event": kind, "time": round(time.time(), 3), **values}


def standing_events(run_dir: Path) -> list[Event]:
    """The events of a run that stand, in order. UserError as `read_events`."""
    return standing(read_events(run_dir / METRICS))


def standing(events: Sequence[Event]) -> list[Event]:
    """Pick the events that stand, in order.

    One of `RETURNS` at step s undoes all earlier events of steps above s. Of what remains, the last event of a kind, a
    step and a split or rank counts. Events without a step stand.
    """
    kept, seen, limit = list[Event](), set[tuple[Any, ...]](), math.inf
    for event in reversed(events):
        step = event.get("step")
        if step is not None:
            key = (event["event"], step, event.get("split"), event.get("rank"))
            if step > limit or key in seen:
                continue
            seen.add(key)
            if event["event"] in RETURNS:
                limit = step
        kept.append(event)
    return kept[::-1]


def read_events(path: Path) -> list[Event]:
    """All events of a file of metrics, in order.

    Whole lines only: a run that was killed may have left the last one torn. UserError for a line that no run writes.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a run that has trained") from None
    return [_event(line, f"{path}, line {number},") for number, line in enumerate(lines, 1)]


def _event(line: bytes, where: str) -> Event:
    fix = "take the line out, or train again"
    try:
        event: Event = json.loads(line.decode())
        name, step = event["event"], event.get("step")
        known = isinstance(event.get("split"), str | None) and isinstance(event.get("rank"), int | None)
        if not isinstance(name, str) or not known:
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where} is no event of a run; {fix}") from None
    if (step is not None or name in _OF_A_STEP) and (type(step) is not int or step < 0):
        raise UserError(f"{where} is a {name} event whose step is {step}, not a whole number; {fix}")
    return event


class JsonLines:
    """One object per line, at full precision, flushed line by line so that a killed run loses none."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):  # a start that was killed in the middle of a line
            os.truncate(path, content.rfind(b"\n") + 1)
        self.found = content.count(b"\n")
        """Lines of the starts before."""
        began, continued = (content.count(f'{{"event": "{kind}"'.encode()) for kind in ("start", "resume"))
        self.starts = max(began, continued + 1) if content else 0
        """The starts before, as far as its lines tell: earlier versions wrote no `start`."""
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()
        self._warned = False

    def write(self, event: Event) -> None:
        self._waiting += (json.dumps(_legal(event), allow_nan=False) + "\n").encode()
        self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def leave(self) -> None:
        """Each line is on disk already, as far as the disk takes it."""

    def _flush(self) -> None:
        """A full disk ends no run: the lines wait in memory until there is room, which is said once."""
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if self._warned:
                return
            self._warned = True
            with suppress(OSError):  # what is said may go to that disk as well
                waits = "the run goes on, and they wait in memory for room"
                print(f"megallama: metrics cannot be written ({error.strerror}); {waits}", file=sys.stderr)


def _legal(value: Any) -> Any:
    """As JSON can have it, which knows no infinity: a number that is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _legal(inner) for key, inner in value.items()}
    return [_legal(inner) for inner in value] if isinstance(value, list | tuple) else value
