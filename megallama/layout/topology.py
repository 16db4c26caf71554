"""Rank arithmetic, pure: which ranks stand together on each axis of the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

AxisName = Literal["pp", "dp", "cp", "tp"]
AXES: tuple[AxisName, ...] = ("pp", "dp", "cp", "tp")


def context_slices(length: int, rank: int, size: int) -> list[slice]:
    """What context-parallel rank `rank` of `size` holds of `length` positions: a slice, and its mirror from the tail.

    Under causal attention a position works in proportion to its place, so that all ranks work as much (arXiv
    2407.21783, section 3.3.2). One rank has all in one slice.
    """
    if size == 1:
        return [slice(0, length)]
    width = length // (2 * size)
    return [slice(i * width, (i + 1) * width) for i in (rank, 2 * size - 1 - rank)]


@dataclass(frozen=True)
class Topology:
    """The mesh pp x dp x cp x tp.

    tp is innermost, so that ranks which talk most share a node; pp is outermost, since stages talk least
    (arXiv 2104.04473, section 3).
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in the mesh."""
        return self.pp * self.dp * self.cp * self.tp

    def rank(self, *, pp: int = 0, dp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """The global rank at these coordinates."""
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    def coordinate(self, rank: int, axis: AxisName) -> int:
        """Where `rank` stands on `axis`."""
        position = AXES.index(axis)
        inner = prod(getattr(self, name) for name in AXES[position + 1 :])
        size: int = getattr(self, axis)
        return rank // inner % size

    def peers(self, rank: int, axes: Sequence[AxisName]) -> list[int]:
        """The ranks that differ from `rank` on `axes` only, itself included, in order."""
        held = {axis: self.coordinate(rank, axis) for axis in AXES}
        free = product(*(range(getattr(self, axis)) if axis in axes else [held[axis]] for axis in AXES))
        return sorted(self.rank(**dict(zip(AXES, there, strict=True))) for there in free)
