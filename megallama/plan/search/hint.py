"""How many GPUs would do, where a search finds no layout. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from megallama.config.schema import MOST_PIPELINE, RunConfig
from megallama.layout.check import divisors, legal_tensors
from megallama.plan.hardware import Gpu
from megallama.plan.memory.fit import rank_bytes, usable_bytes
from megallama.plan.search.space import choices, pipeline_sizes, refusal, tensor_sizes, with_layout

NEAR = 128
"""GPU counts on either side that are tried in place of one without a legal layout."""


def enough_gpus(config: RunConfig, world_size: int, gpu: Gpu) -> str:
    """The end of a sentence: the first doubling of the GPUs on which a layout fits; empty if six are too few."""
    limit = usable_bytes(gpu)
    for gpus in (world_size << n for n in range(1, 7)):
        if any(max(rank_bytes(one, gpus)) <= limit for one in _smallest(config, gpus, gpu)):
            return f"; try --gpus {gpus}"
    return ""


def legal_gpus(config: RunConfig, world_size: int, gpu: Gpu) -> str:
    """The end of a sentence: the nearest GPUs below and above that have a legal layout; empty if none has."""
    node, copies = int(gpu.gpus_per_node or 1), divisors(config.train.global_batch_size)
    tensors = [tp for tp in legal_tensors(config) if tp <= node]
    most = min(config.model.num_hidden_layers, MOST_PIPELINE)
    sizes = {tp * pp * dp for tp in tensors for pp in range(1, most + 1) for dp in copies}
    whole = sorted(size for size in sizes if size <= node or size % node == 0)
    below, above = [size for size in whole if size < world_size], [size for size in whole if size > world_size]
    found = []
    for side in (below[: -NEAR - 1 : -1], above[:NEAR]):
        found += [size for size in side if any(_smallest(config, size, gpu))][:1]
    return f"; nearest legal: --gpus {' or '.join(map(str, found))}" if found else ""


def _smallest(config: RunConfig, world_size: int, gpu: Gpu) -> Iterator[RunConfig]:
    """The legal ones of the layouts that keep the least: all is recomputed, in micro-batches of one sequence."""
    node = int(gpu.gpus_per_node or 1)
    if world_size > node and world_size % node:
        return
    for tp in tensor_sizes(config, world_size, gpu, _silent):
        for pp in pipeline_sizes(config, world_size // tp, tp, _silent):
            for choice in choices(pp, config.train.global_batch_size, world_size // (tp * pp)):
                if choice["recompute"] != "full" or choice["micro_batch_size"] > 1:
                    continue
                candidate = with_layout(config, tp, pp, choice)
                if refusal(candidate, world_size) is None:
                    yield candidate


def _silent(where: str, why: str, layouts: int) -> None:
    """What is out has been said."""
