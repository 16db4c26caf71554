"""Rank arithmetic, pure: which ranks stand together on each axis of the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

AxisName = Literal["pp", "dp", "cp", "tp"]
AXES: tuple[AxisName, ...] = ("pp", "dp", "cp", "tp")


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

    def groups(self, axes: Sequence[AxisName]) -> list[list[int]]:
        """Every set of ranks that differ on `axes` only, each in rank order."""
        fixed = [axis for axis in AXES if axis not in axes]
        groups: list[list[int]] = []
        for held in product(*(range(getattr(self, axis)) for axis in fixed)):
            here = dict(zip(fixed, held, strict=True))
            free = product(*(range(getattr(self, axis)) for axis in AXES if axis in axes))
            names = [axis for axis in AXES if axis in axes]
            groups.append(sorted(self.rank(**here, **dict(zip(names, there, strict=True))) for there in free))
        return groups
