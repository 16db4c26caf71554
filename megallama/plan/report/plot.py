"""A plan as a picture: what lies in the memory of each pipeline rank, and what the ranks do when.

matplotlib is an optional extra and imported only here, when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.check import check_config
from megallama.layout.schedules import Kind, action_lists
from megallama.plan.memory.ledger import memory_rows
from megallama.plan.memory.lines import MemoryRow
from megallama.plan.report.new_file import check_new_file, write_new_files
from megallama.plan.time.simulation import Span, bubble, makespan, relative_seconds, simulate
from megallama.plan.time.timeline import refuse_long
from megallama.system.lock import beside, output_lock

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

_WIDTH = 11.0
"""Inches."""
_PER_RANK = 0.35
"""Inches of the timeline."""
_MOST_NUMBERED = 16
"""Micro-batches up to which a number fits into a forward."""

_MOST_DRAWN = 10_000
"""Micro-batches times stages: each takes milliseconds."""

_KINDS: dict[Kind, tuple[str, str]] = {
    "F": ("forward", "tab:blue"),
    "B": ("backward", "tab:green"),
    "I": ("inputs' part of a backward", "tab:olive"),
    "W": ("weights' part of a backward", "tab:purple"),
}


def plot_plan(config: RunConfig, world_size: int, path: Path) -> None:
    """Draw the plan of a run on `world_size` ranks into `path`, a PNG, SVG or PDF.

    UserError if the run is not legal there, if `path` cannot be such a file, or if matplotlib is not installed.
    """
    check_target(path)
    with output_lock(beside(path), f"--plot={path}", "--plot"):
        picture = BytesIO()
        draw_plan(config, world_size).savefig(picture, format=path.suffix[1:].lower(), dpi=150)
        write_new_files({path: picture.getvalue()})


def check_target(path: Path) -> None:
    """UserError for a file that no picture can go to, or that is there, and where there is nothing to draw with."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot={path} is no picture; end it in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    check_new_file("--plot", path, "out.png")
    if find_spec("matplotlib") is None:
        raise UserError(f"--plot={path} needs matplotlib, which is not installed; type pip install matplotlib")


def draw_plan(config: RunConfig, world_size: int) -> Figure:
    """The memory of each pipeline rank above the timeline of a step, which a single stage has none of."""
    from matplotlib.figure import Figure

    batching = check_config(config, world_size)
    if config.parallel.pipeline > 1:
        refuse_long(config, batching.gradient_accumulation_steps, _MOST_DRAWN)
    rows, ranks = memory_rows(config, batching.dp_size), config.parallel.pipeline
    if ranks == 1:
        figure = Figure(figsize=(_WIDTH, 4.5), layout="constrained")
        draw_memory(figure.subplots(), rows)
        return figure
    heights = (4.5, 1.2 + _PER_RANK * ranks)
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    draw_memory(above, rows)
    lists = action_lists(config.parallel, batching.gradient_accumulation_steps)
    draw_timeline(below, simulate(lists, relative_seconds(config)), config.parallel.schedule)
    return figure


def draw_memory(axes: Axes, ranks: Sequence[Sequence[MemoryRow]]) -> None:
    """A bar for each pipeline rank, stacked of the rows of the ledger, in GiB."""
    from matplotlib import colormaps

    # Matplotlib's ten default colours are too few for the rows of some schedules.
    colours = colormaps["tab20"]
    names = {row.key: row.name for rows in ranks for row in rows if row.size}
    bottoms = [0.0] * len(ranks)
    for index, (key, name) in enumerate(names.items()):
        heights = [sum(row.size for row in rows if row.key == key) / 2**30 for rows in ranks]
        axes.bar(range(len(ranks)), heights, bottom=bottoms, width=0.7, color=colours(index), label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for rank, total in enumerate(bottoms):
        axes.annotate(f"{total:.2f}", (rank, total), ha="center", va="bottom")
    axes.set(title="Memory of a rank at its fullest", xlabel="pipeline rank", ylabel="GiB", xticks=range(len(ranks)))
    axes.set_xlim(-0.5, max(4, len(ranks)) - 0.5)
    axes.set_ylim(0, 1.1 * max(bottoms))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)


def draw_timeline(axes: Axes, spans: Sequence[Sequence[Span]], schedule: str) -> None:
    """A line for each pipeline rank; what is left grey is waiting. A layer's forward takes 1."""
    ranks, length = len(spans), makespan([list(row) for row in spans])
    axes.barh(range(ranks), [length] * ranks, height=0.8, color="0.85", label="waiting")
    for kind, (name, colour) in _KINDS.items():
        drawn = [(rank, span) for rank, row in enumerate(spans) for span in row if span.action.kind == kind]
        if drawn:
            at, starts = [rank for rank, _ in drawn], [span.start for _, span in drawn]
            widths = [span.end - span.start for _, span in drawn]
            axes.barh(at, widths, left=starts, height=0.8, color=colour, edgecolor="white", linewidth=0.5, label=name)
    if max(span.action.micro_batch for row in spans for span in row) < _MOST_NUMBERED:
        for rank, row in enumerate(spans):
            for span in (span for span in row if span.action.kind == "F"):
                middle = (span.start + span.end) / 2
                axes.annotate(f"{span.action.micro_batch}", (middle, rank), ha="center", va="center", color="white")
    share = bubble([list(row) for row in spans])
    axes.set(title=f"{schedule}: {share:.1%} of all ranks' time is waiting", ylabel="pipeline rank")
    axes.set(xlabel="time, in forwards of a layer", yticks=range(ranks), xlim=(0, length))
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
