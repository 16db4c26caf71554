"""Types of the differentiable collectives, for the checker of `megallama verify --types`.

Along each axis of the mesh a tensor has one of four types (spmd_types, github.com/meta-pytorch/spmd_types):

| type | the tensor | its gradient |
| --- | --- | --- |
| replicate | the same on all ranks | a share of a sum that is not yet taken |
| invariant | the same on all ranks | the same on all ranks: the sum is taken |
| varying | its own on each rank | its own on each rank |
| partial | a share of a sum that is not yet taken | the same on all ranks |

Each autograd function that communicates says its types in a method `spmd_typecheck` beside its forward and backward;
the checker finds it by this name and calls it with the arguments of the forward that it asks for. What is here stands
for the types of one step. The package is imported by the checker alone: training needs none of it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from megallama.parallel.mesh import Axis

Typed: TypeAlias = Any
"""A tensor, or what stands for one in the checker: its number of dimensions and its types."""


def invariant_to_replicate(x: Typed, axis: Axis) -> Typed:
    """The same values, whose gradient is then to be summed."""
    from spmd_types import I, R, rules

    return rules.convert(x, _mesh_axis(axis), src=I, dst=R)


def replicate(x: Typed, axis: Axis) -> Typed:
    """What must be replicate already."""
    from spmd_types import R, rules

    return rules.convert(x, _mesh_axis(axis), src=R, dst=R)


def sum_to_invariant(x: Typed, axis: Axis) -> Typed:
    """The sum of shares, whose gradient is the gradient of each share."""
    from spmd_types import I, V, rules

    return rules.all_reduce(x, _mesh_axis(axis), src=V, dst=I)


def gather_to_replicate(x: Typed, dim: int, axis: Axis) -> Typed:
    """The ranks' tensors side by side; the gradient is to be summed, and cut back."""
    from spmd_types import R, S, rules

    return rules.all_gather(x, _mesh_axis(axis), src=S(dim), dst=R)


def sum_to_varying(x: Typed, dim: int, axis: Axis) -> Typed:
    """This rank's part of the sum of shares; the gradient is to be gathered."""
    from spmd_types import S, V, rules

    return rules.reduce_scatter(x, _mesh_axis(axis), src=V, dst=S(dim))


def exchange_varying(x: Typed, cut: int, joined: int, axis: Axis) -> Typed:
    """Parts along `joined` for parts along `cut`; the gradient goes back as it came."""
    from spmd_types import S, rules

    return rules.all_to_all(x, _mesh_axis(axis), src=S(joined), dst=S(cut))


def einsum(equation: str, *operands: Typed) -> Typed:
    """What a multiplication within each rank makes of the types of its operands."""
    from spmd_types import rules

    return rules.einsum(equation, *operands)


def _mesh_axis(axis: Axis) -> Any:
    from spmd_types import MeshAxis

    return MeshAxis.of(axis.group) if axis.group is not None else MeshAxis.of(1, 1)
