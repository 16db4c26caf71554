"""Pipeline stages: the layers each holds and the rank that holds it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from heapq import heapify, heapreplace

from megallama.config.schema import ModelConfig, RunConfig
from megallama.layout.counts import Convention, attention_flops_per_token, count_parameters, kernel_convention
from megallama.layout.schedules import chunks, stage_ranks


@dataclass(frozen=True)
class Stage:
    """Consecutive decoder layers, with the embedding before the first and the head after the last."""

    index: int
    rank: int
    """Place on the pipeline axis of the rank that holds it."""
    layers: range


def stages(config: RunConfig) -> list[Stage]:
    """Every stage of the pipeline in the order of the model; a single one without a pipeline."""
    parallel = config.parallel
    ranks = stage_ranks(parallel)
    found, first = [], 0
    for index, (rank, layers) in enumerate(zip(ranks, layers_per_stage(config), strict=True)):
        found.append(Stage(index, rank, range(first, first + layers)))
        first += layers
    return found


def layers_per_stage(config: RunConfig) -> tuple[int, ...]:
    """Decoder layers of each stage: as `parallel.layers_per_stage` lists them, or split evenly or by cost."""
    wanted, layers = config.parallel.layers_per_stage, config.model.num_hidden_layers
    if isinstance(wanted, tuple):
        return wanted
    count = config.parallel.pipeline * chunks(config.parallel)
    convention = kernel_convention(config.train.objective)
    head = head_in_layers(config.model, config.data.sequence_length, convention) if wanted == "balanced" else 0.0
    return balanced(layers, count, head)


@cache  # a search asks again for every micro-batch size
def balanced(layers: int, stages: int, head: float) -> tuple[int, ...]:
    """`layers` over `stages`, the last of which has a head that costs as much as `head` layers.

    The slowest stage sets the pace, so each layer goes where the stage is the cheapest; the surplus of a division goes
    to middle stages before the first, which has the embedding's memory.
    """
    split, extra = [1] * stages, [*[0.0] * (stages - 1), head]
    cheapest = [(1 + extra[index], index == 0, index) for index in range(stages)]
    heapify(cheapest)
    for _ in range(layers - stages):
        _, first, index = cheapest[0]
        split[index] += 1
        heapreplace(cheapest, (split[index] + extra[index], first, index))
    return tuple(split)


def head_in_layers(model: ModelConfig, sequence_length: int, convention: Convention) -> float:
    """FLOPs of the output head over those of a decoder layer, attention counted as its kernel computes it."""
    count = count_parameters(model)
    attention = attention_flops_per_token(model, sequence_length, convention) // (6 * model.num_hidden_layers)
    return count.head_matmul / (count.matmul_per_layer + attention)
