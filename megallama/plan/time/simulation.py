"""A step of a pipeline laid out in time: who computes what when, how long ranks wait, and a drawing of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from math import ceil, floor

from megallama.config.schema import ParallelConfig, RunConfig, Schedule
from megallama.errors import UserError
from megallama.layout.counts import FORWARD_AGAIN, kernel_convention
from megallama.layout.schedules import Action, Kind, action_lists, chunks, schedule_of
from megallama.layout.stages import head_in_layers, stages


def waiting(config: RunConfig, micro_batches: int) -> float:
    """Waiting over work of a rank in closed form, stages being equal and all thirds of a step taking the same time.

    A search ranks thousands of layouts by it, and simulates the best of them.

    1F1B waits (pp - 1) / m of its work, interleaved (pp - 1) / (chunks * m) (arXiv 2104.04473, section 2.2), and more
    with fewer micro-batches than ranks, since each round of chunks then has gaps. ZBV waits while the pipeline fills,
    as long as pp - 1 forwards of one of its two chunks (arXiv 2401.10241, section 6). DualPipeV waits twice that: what
    the two of a pair make leaves after the second.
    """
    pp, schedule, each = config.parallel.pipeline, config.parallel.schedule, chunks(config.parallel)
    if schedule == "zbvzerobubble":
        return (pp - 1) / (6 * micro_batches)
    if schedule == "dualpipev":
        return (pp - 1) / (3 * micro_batches)
    gaps = (each - 1) * max(0, pp - micro_batches)
    return (pp - 1 + gaps) / (each * micro_batches)


@dataclass(frozen=True)
class Span:
    """When it is computed."""

    action: Action
    start: float
    end: float


def simulate(lists: list[list[Action]], seconds: Mapping[tuple[Kind, int], float]) -> list[list[Span]]:
    """Each rank runs its list in order, each action once what it needs is there; `seconds` by kind and stage.

    A forward needs that of the stage before, a backward its own forward and the backward of the stage after, the
    weights' part of a backward its input's part. Communication takes no time.
    """
    count = 1 + max(action.stage for actions in lists for action in actions)
    done: dict[tuple[str, int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in lists]
    leaving: list[list[tuple[str, int, int]]] = [[] for _ in lists]
    while any(len(spans[rank]) < len(actions) for rank, actions in enumerate(lists)):
        moved = False
        for rank, actions in enumerate(lists):
            while len(spans[rank]) < len(actions):
                action = actions[len(spans[rank])]
                start = spans[rank][-1].end if spans[rank] else 0.0
                try:
                    for need in _needs(action, count):
                        start = max(start, done[need])
                except KeyError:
                    break
                end = start + seconds[action.kind, action.stage]
                spans[rank].append(Span(action, start, end))
                leaving[rank].append(_result(action))
                if not action.sent_with_next:
                    done |= dict.fromkeys(leaving[rank], end)
                    leaving[rank].clear()
                moved = True
        assert moved, "every rank waits for another"
    return spans


def makespan(spans: list[list[Span]]) -> float:
    """From the first action of any rank to the end of the last."""
    return max(span.end for rank in spans for span in rank)


def bubble(spans: list[list[Span]]) -> float:
    """Share of all ranks' time in which they wait."""
    busy = sum(span.end - span.start for rank in spans for span in rank)
    return 1 - busy / (makespan(spans) * len(spans))


def relative_seconds(config: RunConfig) -> dict[tuple[Kind, int], float]:
    """How long each action of each stage takes, where a layer's forward takes 1: its backward 2, half for the weights.

    Full recomputation runs the forward of a layer again in each part of a backward; selective is too little to count.
    The output head computes its gradients with the loss, in forward: three times what one pass of its FLOPs takes. The
    first stage computes nothing for its input: torch leaves all of its backward to the weights' part.
    """
    head = head_in_layers(config.model, config.data.sequence_length, kernel_convention(config.train.objective))
    again = 1 if config.train.recompute in FORWARD_AGAIN else 0
    every = stages(config)
    found: dict[tuple[Kind, int], float] = {}
    for stage in every:
        index, layers = stage.index, len(stage.layers)
        found["F", index] = layers + (3 * head if stage == every[-1] else 0.0)
        found["B", index] = (2 + again) * layers
        found["I", index] = (1 + again) * layers if index > 0 else 0
        found["W", index] = (1 + again) * layers if index > 0 else found["B", index]
    return found


def kept(config: RunConfig, lists: list[list[Action]]) -> list[float]:
    """What each rank keeps for backward at its peak, in micro-batches through all of its layers.

    A backward frees what its forward kept when it has computed the weights' gradients.
    """
    layers = {stage.index: len(stage.layers) for stage in stages(config)}
    found = []
    for actions in lists:
        whole = sum(layers[stage] for stage in {action.stage for action in actions})
        held = accumulate({"F": 1, "I": 0}.get(action.kind, -1) * layers[action.stage] for action in actions)
        found.append(max(held) / whole)
    return found


def simulated_waiting(config: RunConfig, micro_batches: int) -> float:
    """Waiting over work of the rank that computes most in a step, its stages as they are.

    A schedule in its stride takes equally long for equally many more micro-batches, so a step of more than 8 * pp is
    drawn out from shorter ones; an interleaved one varies by up to a fiftieth where stages are unequal.
    """
    parallel, pp = config.parallel, config.parallel.pipeline
    if pp == 1:
        return 0.0
    seconds = tuple(relative_seconds(config).items())
    length_and_work = partial(_length_and_work, parallel.schedule, pp, parallel.chunks, seconds)
    rounds, rest = divmod(micro_batches, pp)
    if rounds <= 8 or (rest and schedule_of(parallel).in_rounds):
        length, work = length_and_work(micro_batches)
    else:
        short, long = (length_and_work(count * pp + rest) for count in (4, 8))
        length, work = (few + (many - few) * (rounds - 4) / 4 for few, many in zip(short, long, strict=True))
    return length / work - 1


@cache  # a search asks again for every tp and micro-batch size
def _length_and_work(
    schedule: Schedule, pp: int, chunks: int, seconds: tuple[tuple[tuple[Kind, int], float], ...], micro_batches: int
) -> tuple[float, float]:
    """The length of a step, and the work of the rank that computes most in it."""
    parallel = ParallelConfig(pipeline=pp, schedule=schedule, chunks=chunks)
    spans = simulate(action_lists(parallel, micro_batches), dict(seconds))
    return makespan(spans), max(sum(span.end - span.start for span in rank) for rank in spans)


def _result(action: Action) -> tuple[str, int, int]:
    return "I" if action.kind == "B" else action.kind, action.stage, action.micro_batch


def _needs(action: Action, count: int) -> list[tuple[str, int, int]]:
    stage, m = action.stage, action.micro_batch
    if action.kind == "F":
        return [("F", stage - 1, m)] if stage > 0 else []
    if action.kind == "W":
        return [("I", stage, m)]
    return [("F", stage, m), *([("I", stage + 1, m)] if stage < count - 1 else [])]


# Sums of floats differ by less from what they should be, and no action that does something takes less.
_NOTHING = 1e-9
MOST_WRITTEN = 100_000
"""Micro-batches times stages: more are gigabytes, which nobody reads."""


def refuse_long(config: RunConfig, micro_batches: int) -> None:
    """UserError for a step of more than MOST_WRITTEN micro-batches times stages, with the longest that is not."""
    pipeline = config.parallel.pipeline
    # A multiple of the pipeline, twice it at least: a number that every schedule takes.
    longest = max(2, MOST_WRITTEN // (pipeline * chunks(config.parallel)) // pipeline) * pipeline
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
    refuse_long(config, micro_batches)
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
