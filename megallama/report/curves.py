"""The curves of a run: what its events say, over the axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megallama.errors import printable
from megallama.report.axes import Axes, Position, number
from megallama.report.thinning import thinned
from megallama.run_dir.events import Event

GIB = 2**30
_MOST_PARTS = 16
"""Of the time of a step; a run tells eleven at most."""


@dataclass(frozen=True)
class Plot:
    """One of the plots of a report."""

    key: str
    title: str
    unit: str = ""
    logarithmic: bool = False
    parts: bool = False
    """Its curves are many parts of one whole: each has its own colour, and runs differ by their dashes."""


PLOTS = (
    Plot("loss", "Loss"),
    Plot("perplexity", "Perplexity", logarithmic=True),
    Plot("lr", "Learning rate"),
    Plot("grad_norm", "Gradient norm, before clipping", logarithmic=True),
    Plot("tokens_per_second", "Throughput", "tokens/s"),
    Plot("mfu", "MFU", "%"),
    Plot("breakdown", "Where the time goes", "s", parts=True),
    Plot("memory", "Memory", "GiB"),
)


@dataclass(frozen=True)
class Curve:
    """Values over the axes; None where a value was not finite."""

    plot: str
    name: str
    style: str
    """`line`, `points` for a line whose points show, or `dashed` for what was predicted."""
    positions: Sequence[Position]
    values: Sequence[float | None]


def curves_of(stand: Sequence[Event], axes: Axes, buckets: int) -> list[Curve]:
    """The curves of the events that stand, thinned to `buckets`."""
    return [
        _thin(curve, buckets)
        for curve in (*_trained(stand, axes), *_evaluations(stand, axes), *_predictions(stand, axes))
    ]


def _thin(curve: Curve, buckets: int) -> Curve:
    kept = thinned(curve.values, buckets)
    positions, values = [curve.positions[i] for i in kept], [curve.values[i] for i in kept]
    return Curve(curve.plot, curve.name, curve.style, positions, values)


def _trained(stand: Sequence[Event], axes: Axes) -> Iterator[Curve]:
    train = sorted((event for event in stand if event["event"] == "train"), key=lambda event: event["step"])
    where = [axes.of(event) for event in train]

    def curve(plot: str, name: str, value: Callable[[Event], float | None]) -> Curve:
        return Curve(plot, name, "line", where, [value(event) for event in train])

    yield curve("loss", "train", lambda e: number(e, "loss"))
    yield curve("perplexity", "train", _perplexity)
    yield curve("lr", "learning rate", lambda e: number(e, "lr"))
    yield curve("grad_norm", "gradient norm", lambda e: number(e, "grad_norm"))
    yield curve("tokens_per_second", "tokens/s", lambda e: number(e, "tokens_per_second"))
    yield curve("mfu", "mfu, attention over the whole square", lambda e: _times(number(e, "mfu"), 100))
    yield curve("mfu", "mfu_causal, over the positions seen", lambda e: _times(number(e, "mfu_causal"), 100))
    yield from _breakdown(train, where)
    yield curve("memory", "measured, rank 0", lambda e: _times(number(e, "peak_memory_bytes"), 1 / GIB))


def _breakdown(train: Sequence[Event], where: Sequence[Position]) -> Iterator[Curve]:
    """The seconds of a step by what they are spent on; a part that an event leaves out took none."""
    told = [parts if isinstance(parts := event.get("breakdown"), dict) else {} for event in train]
    for name in list(dict.fromkeys(name for parts in told for name in parts))[:_MOST_PARTS]:
        values = [number({name: 0.0, **parts}, name) if parts else None for parts in told]
        if any(values):
            yield Curve("breakdown", printable(name), "line", where, values)


def _perplexity(event: Event) -> float | None:
    loss = number(event, "loss")
    return None if loss is None else math.exp(min(loss, 700.0))


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _evaluations(stand: Sequence[Event], axes: Axes) -> Iterator[Curve]:
    evaluations = [event for event in stand if event["event"] == "eval"]
    for split in dict.fromkeys(printable(str(event.get("split"))) for event in evaluations):
        of_split = [event for event in evaluations if printable(str(event.get("split"))) == split]
        where = [axes.of(event) for event in of_split]
        name = "train, evaluated" if split == "train" else split
        for plot in ("loss", "perplexity"):
            yield Curve(plot, name, "points", where, [number(event, plot) for event in of_split])


def _predictions(stand: Sequence[Event], axes: Axes) -> Iterator[Curve]:
    """Memory of the fullest rank as planned, and as measured after ten steps where a GPU can tell."""
    last = max(axes.of(event) for event in stand if event["event"] == "train")
    told = [e for e in stand if e["event"] in ("start", "forecast") and e.get("step") is not None]
    for name, key, style in (
        ("measured, fullest rank", "peak_memory_bytes", "points"),
        ("predicted, fullest rank", "predicted_memory_bytes", "dashed"),
    ):
        found = [(axes.of(event), value / GIB) for event in told if (value := number(event, key)) is not None]
        if style == "dashed" and found:
            found.append((max(last, found[-1][0]), found[-1][1]))  # it holds until the end
        if found:
            yield Curve("memory", name, style, [position for position, _ in found], [value for _, value in found])
