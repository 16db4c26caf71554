"""Records of runs as one picture: the plots of the page over steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megallama.report.curves import PLOTS, Curve, Plot
from megallama.report.marks import MARKS, RETURNED
from megallama.report.record import Record

_DASHES = ("-", "--", ":", "-.")
_SYMBOLS = {
    "resume": ">",
    "rollback": "<",
    "rewind": "8",
    "skip": "x",
    "straggler": "d",
    "checkpoint": "|",
    "checkpoint_failed": "+",
}
_COLUMNS = 2
_MOST_NAMES = 9
"""In the legend of a plot; more would cover it."""
_WIDTH, _OF_A_LINE, _OF_A_TITLE = 105, 9, 1.35
"""Of a plot, of the line before a name in its legend, and of a letter of its title, in letters of a legend."""


def draw_picture(records: Sequence[Record]) -> bytes:
    """A PNG. Needs no display: the figure is drawn by no window system."""
    plots = [plot for plot in PLOTS if any(curve.plot == plot.key for record in records for curve in record.curves)]
    rows = -(-(len(plots) + 1) // _COLUMNS)
    figure = Figure(figsize=(14, 3.2 * rows))
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for plot, each in zip(plots, axes, strict=False):
        _draw_plot(each, plot, records)
    _draw_history(axes[len(plots)], records)
    for each in axes[len(plots) + 1 :]:
        each.set_axis_off()
    figure.subplots_adjust(left=0.075, right=0.99, top=1 - 0.12 / rows, bottom=0.16 / rows, hspace=0.3, wspace=0.2)
    made = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font has not: they are drawn as boxes
        figure.savefig(made, format="png", dpi=100)
    return made.getvalue()


def _draw_plot(axes: Axes, plot: Plot, records: Sequence[Record]) -> None:
    lines, names = list[Line2D](), list[str]()
    drawn = list(dict.fromkeys(curve.name for record in records for curve in record.curves if curve.plot == plot.key))
    for at, record in enumerate(records):
        for curve in (curve for curve in record.curves if curve.plot == plot.key):
            within = drawn.index(curve.name)
            colour, dash = (at, within) if len(records) > 1 and not plot.parts else (within, at)
            lines.append(_draw_curve(axes, curve, f"C{colour % 10}", _DASHES[dash % len(_DASHES)]))
            names.append(f"{record.name}: {curve.name}" if len(records) > 1 else curve.name)
        for mark in record.marks:
            if mark.kind in RETURNED:
                axes.axvline(mark.position.step, color="0.7", linewidth=0.8, linestyle=":", zorder=0)
    known = [value for record in records for c in record.curves if c.plot == plot.key for value in c.values]
    if plot.logarithmic and all(value is None or value > 0 for value in known):
        axes.set_yscale("log")
    axes.set_title(f"{plot.title}, {plot.unit}" if plot.unit else plot.title, fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    _add_legend(axes, lines, names)


def _draw_curve(axes: Axes, curve: Curve, colour: str, dash: str) -> Line2D:
    values = [float("nan") if value is None else value for value in curve.values]
    (line,) = axes.plot(
        [where.step for where in curve.positions],
        values,
        color=colour,
        linestyle="--" if curve.style == "dashed" else dash,
        linewidth=1.0,
        marker="o" if curve.style == "points" else "",
        markersize=3,
    )
    return line


def _draw_history(axes: Axes, records: Sequence[Record]) -> None:
    kinds = [kind for kind in MARKS if any(mark.kind == kind for record in records for mark in record.marks)]
    for at, record in enumerate(records):
        for lane, kind in enumerate(kinds):
            steps = [mark.position.step for mark in record.marks if mark.kind == kind]
            colour = f"C{(at if len(records) > 1 else lane) % 10}"
            axes.plot(steps, [lane] * len(steps), linestyle="", marker=_SYMBOLS[kind], color=colour, markersize=6)
    axes.set_xlim(_steps(records))
    axes.set_yticks(range(len(kinds)), [MARKS[kind] for kind in kinds])
    axes.set_ylim(max(1, len(kinds)) - 0.5, -0.5)
    axes.set_title("What happened", fontsize=10, loc="left")


def _steps(records: Sequence[Record]) -> tuple[float, float]:
    """From the first to the last step of all, with the margin that matplotlib leaves."""
    steps = [where.step for record in records for curve in record.curves for where in curve.positions]
    margin = 0.05 * max(1, max(steps) - min(steps))
    return min(steps) - margin, max(steps) + margin


def _add_legend(axes: Axes, lines: Sequence[Line2D], names: Sequence[str]) -> None:
    kept = list(names[:_MOST_NAMES])
    if len(names) > _MOST_NAMES:
        kept[-1] += f", and {len(names) - _MOST_NAMES} more"
    columns = _columns(kept, axes.get_title(loc="left"))
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.99)} if columns else {"loc": "upper right"}
    # A space: matplotlib leaves out names that begin with an underscore.
    labels = [f" {name}" for name in kept]
    legend = axes.legend(
        lines[: len(kept)],
        labels,
        fontsize=8,
        ncols=columns or 1,
        columnspacing=1.2,
        handlelength=1.4,
        frameon=not columns,
        **place,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may have dollars in it


def _columns(names: Sequence[str], title: str) -> int:
    """In how many columns a legend of one row, or two, fits beside the title; 0 if it does not."""
    for rows in (1, 2):
        columns = [names[at : at + rows] for at in range(0, len(names), rows)]
        if sum(max(map(len, column)) + _OF_A_LINE for column in columns) + _OF_A_TITLE * len(title) < _WIDTH:
            return len(columns)
    return 0
