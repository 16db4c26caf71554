"""What a run says of itself: curves, marks of what happened to it, and facts in words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megallama.errors import printable
from megallama.report.axes import Axes, axes_of, forward_only, goodput, number, without_idle_starts
from megallama.report.curves import GIB, Curve, curves_of
from megallama.report.marks import MARKS, Mark, marks_of
from megallama.report.ranks import slow_ranks
from megallama.run_dir.events import METRICS, Event, read_events, standing
from megallama.system.regular_file import read_regular

_MOST_ENVIRONMENT = 1 << 20
"""Bytes of environment.json; a run writes a kilobyte."""


@dataclass(frozen=True)
class Record:
    """All that a report shows of a run."""

    name: str
    curves: Sequence[Curve]
    marks: Sequence[Mark]
    facts: dict[str, str]
    ranks: dict[str, str]
    """Ranks that others have waited for, and in words how often and for how long."""


def read_record(run_dir: Path, name: str, buckets: int) -> Record:
    """Read a run, with its curves thinned to `buckets`. UserError for a folder that is none, or has not trained yet."""
    events = forward_only(read_events(run_dir / METRICS))
    stand, happened = standing(events), without_idle_starts(events)
    axes = axes_of(events, stand, str(run_dir / METRICS))
    facts = _reached(stand, axes) | _speed(stand) | _history(happened, stand, axes) | _start(events, stand)
    facts |= _environment(run_dir)
    shown = {printable(said): printable(words) for said, words in facts.items() if words}
    marks = marks_of(happened, stand, axes)
    return Record(name, curves_of(stand, axes, buckets), marks, shown, slow_ranks(stand))


def _reached(stand: Sequence[Event], axes: Axes) -> dict[str, str]:
    last = max(_trained(stand), key=lambda event: event["step"])
    where, total = axes.of(last), number(last, "total_steps")
    return {
        "step": f"{last['step']:,}" + ("" if total is None else f" of {total:,.0f}"),
        "tokens": f"{where.tokens:,.0f}",
        "train loss": _shown(number(last, "loss"), ".4f"),
        **_best(stand),
    }


def _speed(stand: Sequence[Event]) -> dict[str, str]:
    return {
        "tokens/s, median": _shown(_median(stand, "tokens_per_second"), ",.0f"),
        "MFU, attention over the whole square": _shown(_median(stand, "mfu"), ".1%"),
        "MFU, causal": _shown(_median(stand, "mfu_causal"), ".1%"),
    }


def _history(events: Sequence[Event], stand: Sequence[Event], axes: Axes) -> dict[str, str]:
    counts = {kind: sum(event["event"] == kind for event in events) for kind in MARKS}
    starts = sum(event["event"] == "start" for event in events)
    last = events[-1]
    whole = "" if axes.begun is not None else ", by the seconds of steps: its file has no times"
    return {
        "hours": f"{axes.of(max(_trained(stand), key=lambda e: e['step'])).hours:,.2f}{whole}",
        "goodput": _shown(goodput(events, stand), ".1%"),
        "restarts": str(max(counts["resume"], starts - 1)),
        "rollbacks": str(counts["rollback"]),
        "rewinds": str(counts["rewind"]),
        "skipped steps": str(counts["skip"]),
        "checkpoints": f"{counts['checkpoint']}, {counts['checkpoint_failed']} failed",
        "ended": str(last.get("reason", "")) if last["event"] == "stop" else "",
    }


def _start(events: Sequence[Event], stand: Sequence[Event]) -> dict[str, str]:
    """What the last start said, and its memory as planned and measured."""
    begun = max((at for at, event in enumerate(stand) if event["event"] == "start"), default=0)
    mine = stand[begun:]  # an earlier start may have had another layout
    start: Event = next((event for event in reversed(events) if event["event"] == "start"), {})
    forecast: Event = next((event for event in reversed(mine) if event["event"] == "forecast"), {})
    measured = [value for event in _trained(mine) if (value := number(event, "peak_memory_bytes")) is not None]
    predicted = number({**start, **forecast}, "predicted_memory_bytes")
    return {
        "parameters": _shown(number(start, "parameters"), ",.0f"),
        "layout": str(start.get("layout", "")),
        "ranks": _shown(number(start, "ranks"), ".0f"),
        "memory, measured": f"{max(measured) / GIB:.2f} GiB" if measured else "",
        "memory, predicted": "" if predicted is None else f"{predicted / GIB:.2f} GiB",
    }


def _trained(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event["event"] == "train"]


def _best(stand: Sequence[Event]) -> dict[str, str]:
    """The lowest loss of each split, and its step."""
    best: dict[str, tuple[float, int]] = {}
    for event in stand:
        loss = number(event, "loss") if event["event"] == "eval" else None
        if loss is not None and event.get("split") != "train":
            split = str(event.get("split"))
            best[split] = min((loss, event["step"]), best.get(split, (math.inf, 0)))
    return {f"{split} loss, best": f"{loss:.4f} at step {step:,}" for split, (loss, step) in best.items()}


def _median(events: Sequence[Event], key: str) -> float | None:
    found = [value for event in events if (value := number(event, key)) is not None]
    return median(found) if found else None


def _shown(value: float | None, digits: str) -> str:
    return "" if value is None else f"{value:{digits}}"


def _environment(run_dir: Path) -> dict[str, str]:
    """The device and the peak that MFU is a share of; nothing where the run does not say."""
    try:
        told: Any = json.loads(read_regular(run_dir / "environment.json", _MOST_ENVIRONMENT))
        device, peak = str(told["device"]), told["peak"]
        whole = f"{float(peak['flops']) / 1e12:,.2f} TFLOP/s, {peak['source']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {"device": device, "100 % of MFU": whole}
