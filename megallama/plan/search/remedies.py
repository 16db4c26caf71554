"""What a rank that runs out of memory was predicted to hold, and the nearest change that takes less. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.check import check_batching
from megallama.plan.memory.fit import changes, rank_bytes
from megallama.plan.memory.lines import MemoryRow

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
