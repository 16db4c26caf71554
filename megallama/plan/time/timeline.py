"""What each pipeline rank does when, as text: the orders that training runs, laid out in time. Pure."""

from __future__ import annotations

from math import ceil, floor

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.schedules import Action, action_lists, chunks
from megallama.layout.stages import stages
from megallama.plan.time.simulation import Span, bubble, kept, makespan, relative_seconds, simulate

# Sums of floats differ by less from what they should be, and no action that does something takes less.
_NOTHING = 1e-9


MOST_WRITTEN = 100_000
"""Micro-batches times stages: more are gigabytes, which nobody reads."""


def refuse_long(config: RunConfig, micro_batches: int, most: int) -> None:
    """UserError for a step of more than `most` micro-batches times stages, with the longest that is not."""
    pipeline = config.parallel.pipeline
    # A multiple of the pipeline, twice it at least: a number that every schedule takes.
    longest = max(2, most // (pipeline * chunks(config.parallel)) // pipeline) * pipeline
    if micro_batches > longest:
        sequences = config.train.global_batch_size // micro_batches
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size} makes {micro_batches} micro-batches, too many "
            f"to draw; nearest legal: train.global_batch_size={longest * sequences}"
        )


def timeline(config: RunConfig, micro_batches: int, width: int) -> str:
    """The step of a run as `draw` shows it, with the share of waiting and what is kept under it.

    UserError for one of too many micro-batches.
    """
    refuse_long(config, micro_batches, MOST_WRITTEN)
    lists = action_lists(config.parallel, micro_batches)
    spans = simulate(lists, relative_seconds(config))
    ideal = 1 / (1 - bubble(spans))
    return "\n".join(
        [
            f"{config.parallel.schedule}, {micro_batches} micro-batches, {config.parallel.pipeline} pipeline ranks, "
            f"layers per stage {' '.join(str(len(stage.layers)) for stage in stages(config))}",
            draw(spans, width),
            "digits: forward of a micro-batch, letters: its backward, w: weights' part of a backward, '.': waiting",
            f"waiting: {bubble(spans):.1%} of all ranks' time; the step takes {ideal:.2f} times its work",
            "kept for backward, at most: "
            f"{' '.join(f'{count:.3g}' for count in kept(config, lists))} micro-batches through all layers of a rank",
        ]
    )


def draw(spans: list[list[Span]], width: int) -> str:
    """A line per rank: digits are forwards, letters backwards, by micro-batch; `w` weights' parts, `.` waiting.

    The shortest action has a column. What is longer than `width` then goes on in further blocks of lines below.
    """
    shortest = min(span.end - span.start for row in spans for span in row if span.end - span.start > _NOTHING)
    columns = max(width, ceil(makespan(spans) / shortest - _NOTHING))
    scale = columns / makespan(spans)
    lines = [["."] * columns for _ in spans]
    for line, row in zip(lines, spans, strict=True):
        for span in row:
            first, last = (_nearest(time * scale) for time in (span.start, span.end))
            line[first:last] = _letter(span.action) * (last - first)
    blocks = [
        "\n".join(f"{rank:>3} {''.join(line[first : first + width])}" for rank, line in enumerate(lines))
        for first in range(0, columns, width)
    ]
    return "\n\n".join(blocks)


def _nearest(position: float) -> int:
    """The nearest whole column: always up from a half, so that what is a column long is one column, wherever it is."""
    return floor(position + 0.5 + _NOTHING)


def _letter(action: Action) -> str:
    if action.kind == "W":
        return "w"
    return ("0123456789" if action.kind == "F" else "abcdefghij")[action.micro_batch % 10]
