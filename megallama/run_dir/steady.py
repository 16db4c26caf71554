"""How long the steps of a run take once it has settled, by its metrics.jsonl. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megallama.errors import UserError
from megallama.run_dir.events import Event, read_events, standing

SETTLING = 3
"""First steps of a start, in which kernels are compiled and memory is taken."""


def steady_seconds(events: list[Event], every: int) -> list[float]:
    """Seconds per step of the last start's `train` events, each the mean of the `every` steps up to its own.

    Left out are those with a step in which the run settled, or during which a save was being written. Evaluations are
    not in these seconds.
    """
    starts = [index for index, event in enumerate(events) if event["event"] == "resume"]
    settled = (events[starts[-1]]["step"] if starts else 0) + SETTLING
    # Of this start alone, also where it was undone: what stands of others ran somewhere else.
    last = standing(events[starts[-1] :] if starts else events)
    found: dict[int, float] = {}
    saving = False
    for event in last:
        if event["event"] == "train":
            if event["step"] - every >= settled and not saving:
                found[event["step"]] = event["seconds"]
            saving = False
        elif event["event"] in ("checkpoint", "checkpoint_failed"):
            found = {step: seconds for step, seconds in found.items() if step <= event["step"]}
            # The step before which it ended is not recorded yet.
            saving = True
    return list(found.values())


def read_timed(path: Path) -> list[Event]:
    """All events; UserError for seconds that no run writes, which could otherwise pass for a measurement."""
    events = read_events(path)
    for number, event in enumerate(events, 1):
        seconds: Any = event.get("seconds")
        if event["event"] == "train" and (type(seconds) not in (int, float) or not 0 < seconds < math.inf):
            raise UserError(
                f"{path}, line {number}, is a train event whose seconds are {seconds}, not a number above 0; "
                "take the line out, or train again"
            )
    return events
