"""Which part of which logical tensor a local parameter holds.

A logical tensor is a weight as one device would hold it, under its Hugging Face name. Fused parameters hold several,
sharded ones a box of each. Initialisation, checkpoints and parity tests all speak of logical tensors, which is
why none of them depends on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ShardSlice:
    """A box of the logical tensor `name`, of any number of dimensions, held in a local parameter from `row` on.

    It fills whole rows of the parameter, which are what its first dimension counts. Rows that no piece covers are
    padding: zero for ever, in no checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    """Shape of the logical tensor."""
    offset: tuple[int, ...]
    """Where the box starts in the logical tensor."""
    size: tuple[int, ...]
    """Extent of the box."""
    row: int = 0
    """First row of the local parameter that holds it."""

    def of(self, local: Tensor) -> Tensor:
        """The view of this piece in a local tensor of the parameter's shape."""
        return local[self.row : self.row + self.size[0]]


@runtime_checkable
class Sharded(Protocol):
    """A module that says what its own `weight` holds, in names relative to its parent."""

    def pieces(self) -> tuple[ShardSlice, ...]: ...


def shard_slices(root: nn.Module) -> dict[str, tuple[ShardSlice, ...]]:
    """For every parameter under `root`, by its local name, the pieces it holds under their full names."""
    found: dict[str, tuple[ShardSlice, ...]] = {}
    for path, module in root.named_modules():
        if isinstance(module, Sharded):
            parent = path.rpartition(".")[0]
            prefix = f"{parent}." if parent else ""
            found[f"{path}.weight"] = tuple(replace(p, name=f"{prefix}{p.name}.weight") for p in module.pieces())
    missing = {name for name, _ in root.named_parameters()} - found.keys()
    assert not missing, f"parameters without a logical name: {sorted(missing)}"
    return {name: found[name] for name, _ in root.named_parameters()}


def boxes(piece: ShardSlice, start: int, stop: int) -> Iterator[tuple[torch.Size, torch.Size, int]]:
    """What elements start ... stop of a flattened local parameter hold of `piece`.

    Yields (offset in the logical tensor, size, first element in the local parameter) for each box, of which a tensor of
    n dimensions has 2 n - 1 at most.
    """
    first = piece.row * math.prod(piece.size[1:])
    start, stop = max(start - first, 0), min(stop - first, math.prod(piece.size))
    for place, extent, flat in _boxes(piece.size, start, stop):
        offset = torch.Size(a + b for a, b in zip(piece.offset, place, strict=True))
        yield offset, torch.Size(extent), first + flat


def _boxes(size: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The same of a whole tensor of that size: the rest of a row, whole rows, the beginning of a row."""
    row_size = math.prod(size[1:])
    while start < stop:
        row, within = divmod(start, row_size)
        if within or stop - start < row_size:
            end = min(stop, (row + 1) * row_size)
            for place, extent, flat in _boxes(size[1:], within, end - row * row_size):
                yield (row, *place), (1, *extent), row * row_size + flat
        else:
            rows = (stop - start) // row_size
            end = start + rows * row_size
            yield (row, *(0 for _ in size[1:])), (rows, *size[1:]), start
        start = end
