"""What a run recorded in metrics.jsonl, and which of it stands after the run went back. Imports no torch.

Whoever reads the metrics of a run takes `standing_events`: a run that goes back to a checkpoint trains the steps after
it once more, and their lines of before are still in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megallama.errors import UserError

METRICS = "metrics.jsonl"
"""In the run directory."""
RETURNS = "resume", "rollback"
"""Events at whose step the run stands again: what came after it before is undone."""

_OF_A_STEP = *RETURNS, "train", "eval", "checkpoint", "checkpoint_failed"

Event = dict[str, Any]


def standing_events(run_dir: Path) -> list[Event]:
    """The events of a run that stand, in order. UserError as `read_events`."""
    return standing(read_events(run_dir / METRICS))


def standing(events: Sequence[Event]) -> list[Event]:
    """Those of `events` that stand, in order.

    A `resume` or `rollback` at step s undoes all earlier events of steps above s. Of what remains, the last event of a
    kind, a step and a split counts. Events without a step stand.
    """
    kept, seen, limit = list[Event](), set[tuple[str, int, str | None]](), math.inf
    for event in reversed(events):
        step = event.get("step")
        if step is not None:
            key = (event["event"], step, event.get("split"))
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
        name, step = str(event["event"]), event.get("step")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where} is no event of a run; {fix}") from None
    if (step is not None or name in _OF_A_STEP) and (type(step) is not int or step < 0):
        raise UserError(f"{where} is a {name} event whose step is {step}, not a whole number; {fix}")
    return event
