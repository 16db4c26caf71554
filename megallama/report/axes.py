"""Where the events of a run lie: at which step, after how many tokens, and after how many hours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megallama.errors import UserError
from megallama.run_dir.events import RETURNS, Event


class Position(NamedTuple):
    """Of an event, on each of the axes that a report can have."""

    step: int
    tokens: float
    hours: float


@dataclass(frozen=True)
class Axes:
    """The positions of all events of a run."""

    steps: Sequence[int]
    """At which tokens and hours are known, ascending."""
    tokens: Sequence[float]
    hours: Sequence[float]
    begun: float | None
    """Unix seconds of the first event; None where not all events have a time: then hours are those of steps alone."""

    def of(self, event: Event) -> Position:
        """The position of an event with a step. What it does not say is between the steps that do."""
        step, tokens = event["step"], number(event, "tokens")
        if tokens is None:
            tokens = float(np.interp(step, self.steps, self.tokens))
        if self.begun is not None:
            return Position(step, tokens, (event["time"] - self.begun) / 3600)
        return Position(step, tokens, float(np.interp(step, self.steps, self.hours)))


def forward_only(events: Sequence[Event]) -> list[Event]:
    """The same with times that never go back: a clock that was set back stands still until it is there again."""
    found, latest = list[Event](), -math.inf
    for event in events:
        time = number(event, "time")
        if time is not None:
            latest = max(latest, time)
            event = event | {"time": latest}
        found.append(event)
    return found


def without_idle_starts(events: Sequence[Event]) -> list[Event]:
    """The events without starts that ended and trained no step, as of a run that was done: nothing happened there.

    What people did between starts, such as a rollback, stays.
    """
    starts: list[list[Event]] = [[]]
    for event in events:
        before = [earlier["event"] for earlier in starts[-1][-1:]]
        if event["event"] == "resume" or (event["event"] == "start" and before != ["resume"]):
            starts.append([])
        starts[-1].append(event)
    kept = list[Event]()
    for start in starts:
        kinds = {event["event"] for event in start}
        idle = "stop" in kinds and not kinds & {"train", "skip"}
        kept += [event for event in start if not idle or event["event"] not in _OF_A_START]
    return kept


_OF_A_START = "resume", "start", "notice", "eval", "stop"


def axes_of(events: Sequence[Event], stand: Sequence[Event], where: str) -> Axes:
    """The axes of a run from all its events and those that stand; UserError, naming `where`, if it never trained."""
    tokens = {0: 0.0}
    for event in events:
        if event["event"] == "train":
            seen = number(event, "tokens")
            if seen is None:
                raise UserError(
                    f"{where} has a train event of step {event['step']} without tokens; take it out, or train again"
                )
            tokens[event["step"]] = seen
    if not any(event["event"] == "train" for event in stand):
        since = "" if len(tokens) == 1 else " since it went back or was started again"
        raise UserError(f"{where} has no train event{since}; give a run that has trained a step")
    timed = all(number(event, "time") is not None for event in events)
    taken = dict(_seconds_after(stand))
    steps = sorted(tokens)
    hours = np.interp(steps, list(taken), np.cumsum(list(taken.values())) / 3600)
    return Axes(steps, [tokens[step] for step in steps], hours.tolist(), events[0]["time"] if timed else None)


def _seconds_after(stand: Sequence[Event]) -> list[tuple[int, float]]:
    """The step of each train event that stands, ascending, and the seconds of the steps since the one before.

    Before them the step where the file begins, with no seconds: 0, unless somebody has put earlier lines away.
    """
    trained = sorted((e for e in stand if e["event"] == "train"), key=lambda e: e["step"])
    first = next(event for event in stand if event.get("step") is not None)
    begun = 0 if first["event"] == "train" else min(first["step"], trained[0]["step"])
    before = [begun, *(event["step"] for event in trained)]
    return [
        (begun, 0.0),
        *(
            (event["step"], (number(event, "seconds") or 0.0) * (event["step"] - earlier))
            for event, earlier in zip(trained, before, strict=False)
        ),
    ]


def goodput(events: Sequence[Event], stand: Sequence[Event]) -> float | None:
    """Seconds of steps that stand, as a share of the time from the first event to the last; None if it took no time.

    Waits between starts count as lost. Where not all events have a time, the whole is the seconds of all steps and
    those for which training waited for saves.
    """
    useful = sum(seconds for _, seconds in _seconds_after(stand))
    times = [time for event in events if (time := number(event, "time")) is not None]
    whole = max(times) - min(times) if len(times) == len(events) else _spent(events)
    return min(1.0, useful / whole) if whole > 0 else None


def _spent(events: Sequence[Event]) -> float:
    """Seconds of all steps that were ever trained, and of waits for saves."""
    whole, reached = 0.0, 0
    for event in events:
        whole += number(event, "blocked_seconds") or 0.0
        if event["event"] == "train":
            whole += (number(event, "seconds") or 0.0) * max(0, event["step"] - reached)
        if event["event"] in ("train", *RETURNS):
            reached = event["step"]
    return whole


def number(event: Event, key: str) -> float | None:
    """A finite number of an event, or None: what is null or absent was not finite, or not known."""
    value = event.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON has whole numbers of any length
        return None
