"""Marks of what happened to a run: restarts, returns, skipped steps and saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megallama.errors import printable
from megallama.report.axes import Axes, Position, number
from megallama.run_dir.events import RETURNS, Event

MARKS = {
    "resume": "restart",
    "rollback": "rollback",
    "rewind": "rewind",
    "skip": "skipped step",
    "straggler": "straggler",
    "checkpoint": "checkpoint",
    "checkpoint_failed": "failed save",
}
"""Events that are marks, and what a report calls them."""
RETURNED = tuple(kind for kind in RETURNS if kind in MARKS)
"""Marks of a run that begins again at their step: none undoes another."""
MOST_MARKS = 500
"""Of a kind; of more, neighbours are drawn as one."""


@dataclass(frozen=True)
class Mark:
    """Something that happened to a run."""

    kind: str
    position: Position
    text: str
    stands: bool
    """False if the run went back to before it."""


def marks_of(events: Sequence[Event], stand: Sequence[Event], axes: Axes) -> list[Mark]:
    """All that happened, also what the run has gone back to before."""
    return _merged(list(_happened(events, stand, axes)))


def _happened(events: Sequence[Event], stand: Sequence[Event], axes: Axes) -> Iterator[Mark]:
    standing_ones, resumed = {id(event) for event in stand}, False
    for event in events:
        kind = event["event"]
        if kind == "start" and event.get("restarts") and not resumed:
            kind = "resume"  # from nothing: there was no checkpoint to resume
        resumed = event["event"] == "resume" or (resumed and event["event"] != "start")
        if kind in MARKS and event.get("step") is not None:
            undone = kind not in RETURNED and id(event) not in standing_ones
            text = printable(f"{MARKS[kind]}, step {event['step']}{_details(event)}")
            yield Mark(kind, axes.of(event), text + (" (undone)" if undone else ""), not undone)


def _details(event: Event) -> str:
    said = [str(event[key]) for key in ("reason", "path") if event.get(key) is not None]
    match event.get("passed_over"):
        case [first, end]:
            said.append(f"samples from {first} to before {end} passed over")
    if event["event"] == "straggler":
        behind, share = number(event, "seconds"), number(event, "share")
        words = "" if behind is None else f", {behind:.3g} s a step behind"
        said.append(f"{rank_words(event)}{words}" + ("" if share is None else f", {share:.0%} of a step"))
    return "".join(f": {words}" for words in said)


def rank_words(event: Event) -> str:
    """The rank that a `straggler` event is about, and its host if it tells one."""
    host = event.get("host")
    return f"rank {event.get('rank')}" + (f" on {host}" if host is not None else "")


def _merged(marks: Sequence[Mark]) -> list[Mark]:
    """At most about `MOST_MARKS` of a kind: those in the same part of the steps are one."""
    merged: list[Mark] = []
    for kind in MARKS:
        of_kind = sorted((mark for mark in marks if mark.kind == kind), key=lambda mark: mark.position.step)
        width = (of_kind[-1].position.step + 1) / MOST_MARKS if len(of_kind) > MOST_MARKS else 0.0
        groups: dict[object, list[Mark]] = {}
        for number_of, mark in enumerate(of_kind):
            groups.setdefault(int(mark.position.step / width) if width else number_of, []).append(mark)
        for group in groups.values():
            first, last = group[0], group[-1]
            said = f"{len(group)} x {MARKS[kind]}, steps {first.position.step} to {last.position.step}"
            text = first.text if len(group) == 1 else said
            merged.append(Mark(kind, first.position, text, any(mark.stands for mark in group)))
    return merged
