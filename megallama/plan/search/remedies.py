"""What makes a run fit: the largest rows of a rank, a nearest change that takes less, enough GPUs. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megallama.config.schema import MOST_PIPELINE, RunConfig
from megallama.errors import UserError
from megallama.layout.check import check_batching, divisors, legal_tensors
from megallama.plan.hardware import Gpu
from megallama.plan.memory.fit import changes, rank_bytes, usable_bytes
from megallama.plan.memory.lines import MemoryRow
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


WORTHWHILE = 0.9
"""A change is worth naming where it leaves at most this share of the memory."""


@dataclass(frozen=True)
class Change:
    """Another value of one key, and what the fullest rank holds with it."""

    words: str
    """As it is typed: train.micro_batch_size=2."""
    size: int
    """Bytes."""


def largest_terms(rows: list[MemoryRow], count: int = 3) -> list[MemoryRow]:
    """The rows that take most, the largest first."""
    return sorted(rows, key=lambda row: row.size, reverse=True)[:count]


def nearest_change(config: RunConfig, world_size: int) -> Change | None:
    """The first change, from what costs least to what costs most, that helps on as many ranks; None if none does.

    Where none leaves at most 0.9 of the memory, the one that leaves least.
    """
    now = max(rank_bytes(config, world_size))
    less = [change for change in _legal(config, world_size) if change.size < now]
    worthwhile = [change for change in less if change.size <= WORTHWHILE * now]
    return worthwhile[0] if worthwhile else min(less, key=lambda change: change.size, default=None)


def _legal(config: RunConfig, world_size: int) -> Iterator[Change]:
    for changed, ranks, words in changes(config, world_size):
        if ranks != world_size:
            continue
        try:
            check_batching(changed, ranks)
        except UserError:
            continue
        yield Change(words, max(rank_bytes(changed, ranks)))
