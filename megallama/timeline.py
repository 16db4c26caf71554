"""What each pipeline rank does when: the action lists that training runs, laid out in time, as text.

The lists are those of `pipeline.make_schedule`, made without a process group or a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, floor
from typing import Any, Literal

from torch import nn

from megallama.config.schema import ParallelConfig, RunConfig
from megallama.pipeline import make_schedule
from megallama.plan.stages import head_in_layers, stage_ranks, stages

Kind = Literal["F", "B", "I", "W"]
"""Forward; backward whole, for the input alone, for the weights alone."""


# Sums of floats differ by less from what they should be, and no action that does something takes less.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Action:
    """One computation of a rank."""

    kind: Kind
    stage: int
    micro_batch: int
    sent_with_next: bool = field(default=False, compare=False)
    """Its result leaves the rank only after the action that follows it, as in the pairs of DualPipeV."""


@dataclass(frozen=True)
class Span:
    """When it is computed."""

    action: Action
    start: float
    end: float


def action_lists(parallel: ParallelConfig, micro_batches: int) -> list[list[Action]]:
    """What each rank of the pipeline computes in a step, in its order."""
    ranks = stage_ranks(parallel)
    seats = [_Seat(stage, len(ranks), parallel.pipeline) for stage, rank in enumerate(ranks) if rank == 0]
    order = make_schedule(parallel, seats, micro_batches).pipeline_order
    return [_flattened(order[rank]) for rank in range(parallel.pipeline)]


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
                needs = _needs(action, count)
                if not all(need in done for need in needs):
                    break
                free = spans[rank][-1].end if spans[rank] else 0.0
                start = max([free, *(done[need] for need in needs)])
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
    head = head_in_layers(config.model, config.data.sequence_length)
    again = 1 if config.train.recompute == "full" else 0
    every = stages(config)
    found: dict[tuple[Kind, int], float] = {}
    for stage in every:
        layers, first = len(stage.layers), stage.index == 0
        forward = layers + (3 * head if stage == every[-1] else 0.0)
        parts: dict[Kind, float] = {
            "F": forward,
            "B": (2 + again) * layers,
            "I": 0 if first else (1 + again) * layers,
            "W": (2 + again) * layers if first else (1 + again) * layers,
        }
        found |= {(kind, stage.index): seconds for kind, seconds in parts.items()}
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


def timeline(config: RunConfig, micro_batches: int, width: int) -> str:
    """The step of a run as `draw` shows it, with the share of waiting and what is kept under it."""
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


def _result(action: Action) -> tuple[str, int, int]:
    return "I" if action.kind == "B" else action.kind, action.stage, action.micro_batch


def _needs(action: Action, count: int) -> list[tuple[str, int, int]]:
    stage, m = action.stage, action.micro_batch
    if action.kind == "F":
        return [("F", stage - 1, m)] if stage > 0 else []
    if action.kind == "W":
        return [("I", stage, m)]
    return [("F", stage, m), *([("I", stage + 1, m)] if stage < count - 1 else [])]


def _flattened(order: list[Any]) -> list[Action]:
    """Without waiting, which the simulation finds itself; a forward that is paired with a backward comes before it."""
    found = []
    for action in order:
        parts: list[Any] = [] if action is None else list(action.sub_actions or [action])
        found += [
            Action(part.computation_type.value, part.stage_index, part.microbatch_index, part is not parts[-1])
            for part in parts
        ]
    return found


class _Seat:
    """As much of a stage as a schedule looks at when it makes its lists: no process group, no module."""

    group_rank = 0

    def __init__(self, stage_index: int, num_stages: int, group_size: int) -> None:
        self.stage_index, self.num_stages, self.group_size = stage_index, num_stages, group_size
        self.is_first, self.is_last = stage_index == 0, stage_index == num_stages - 1
        self.submod = nn.Identity()
        self.stage_index_to_group_rank: dict[int, int] = {}
