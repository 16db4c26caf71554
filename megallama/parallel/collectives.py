"""Collectives with gradients: the seams through which parallelism enters a layer.

f and g of arXiv 1909.08053 section 3 are `copy_to` and `reduce_from`; their sequence-parallel forms, g and g-bar of
arXiv 2205.05198 section 4.2, are `gather` and `reduce_scatter`. Context parallelism uses `gather`, or the `all_to_all`
of arXiv 2309.14509. Over an axis of one rank each returns its input.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives
from torch import Tensor

from megallama.parallel import types
from megallama.parallel.mesh import Axis


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or `op`) over the axis, as a new tensor."""
    if axis.size == 1:
        return x
    result = x.clone(memory_format=torch.contiguous_format)
    with _timed(axis):
        dist.all_reduce(result, op=op, group=axis.group)
    return result


def all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """[..., n, ...] -> [..., n * size, ...]: the ranks' tensors side by side along `dim`."""
    if axis.size == 1:
        return x
    gathered = begin_all_gather(x, axis).wait()
    return gathered if dim == 0 else gathered.unflatten(0, (axis.size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def sum_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """[..., n, ...] -> [..., n / size, ...]: the sum over the axis, cut along `dim`, this rank's part."""
    if axis.size == 1:
        return x
    parts = x if dim == 0 else x.unflatten(dim, (axis.size, -1)).movedim(dim, 0).flatten(0, 1)
    return begin_sum_scatter(parts, axis).wait()


def exchange(x: Tensor, cut: int, joined: int, axis: Axis) -> Tensor:
    """Every rank's n-th part along `cut` to rank n: [..., c, ..., j, ...] -> [..., c / size, ..., j * size, ...].

    Along `joined` the parts are side by side in the order of the ranks.
    """
    parts = x.unflatten(cut, (axis.size, -1)).movedim(cut, 0).contiguous()
    found = torch.empty_like(parts)
    with _timed(axis):
        dist.all_to_all_single(found, parts, group=axis.group)
    return found.movedim(0, joined).flatten(joined, joined + 1)


@dataclass(frozen=True)
class Pending:
    """A collective that has begun: its result is there after `wait`, beside which a rank computes something else."""

    result: Tensor
    axis: Axis

    def wait(self) -> Tensor:
        """The result. On a GPU the stream that computes waits, and not the host."""
        with _timed(self.axis):
            return _FUNCTIONAL.wait_tensor(self.result)


def begin_all_gather(x: Tensor, axis: Axis) -> Pending:
    """[n, ...] -> [n * size, ...]; `x` must stay as it is until the end."""
    with _timed(axis):
        return Pending(_FUNCTIONAL.all_gather_into_tensor(x.contiguous(), axis.size, _name(axis)), axis)


def begin_sum_scatter(x: Tensor, axis: Axis) -> Pending:
    """[n, ...] -> [n / size, ...], this rank's part of the sum; `x` must stay as it is until the end."""
    with _timed(axis):
        return Pending(_FUNCTIONAL.reduce_scatter_tensor(x.contiguous(), "sum", axis.size, _name(axis)), axis)


def begin_sum(x: Tensor, axis: Axis) -> Pending:
    """The sum over the axis, as a new tensor."""
    with _timed(axis):
        return Pending(_FUNCTIONAL.all_reduce(x, "sum", _name(axis)), axis)


_FUNCTIONAL: Any = torch.ops._c10d_functional
"""torch's collectives in two parts, beginning and end: its compiler keeps what stands between them."""


def _name(axis: Axis) -> str:
    assert axis.group is not None
    return axis.group.group_name


def _timed(axis: Axis) -> AbstractContextManager[None]:
    """A compiled layer has no clock in it: what it sends counts as its forward and backward."""
    return nullcontext() if torch.compiler.is_compiling() else axis.timed()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.axis), None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, axis: Axis) -> types.Typed:
        return types.invariant_to_replicate(x, axis)


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, axis: Axis) -> types.Typed:
        return types.sum_to_invariant(x, axis)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return all_gather(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_scatter(grads[0], ctx.dim, ctx.axis), None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, dim: int, axis: Axis) -> types.Typed:
        return types.gather_to_replicate(x, dim, axis)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return sum_scatter(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grads[0], ctx.dim, ctx.axis), None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, dim: int, axis: Axis) -> types.Typed:
        return types.sum_to_varying(x, dim, axis)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, joined: int, axis: Axis) -> Tensor:
        ctx.cut, ctx.joined, ctx.axis = cut, joined, axis
        return exchange(x, cut, joined, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(grads[0], ctx.joined, ctx.cut, ctx.axis), None, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, cut: int, joined: int, axis: Axis) -> types.Typed:
        return types.exchange_varying(x, cut, joined, axis)


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Identity; its gradient is the sum over the axis."""
    return x if axis.size == 1 else _apply(_CopyTo, x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; its gradient is the identity."""
    return x if axis.size == 1 else _apply(_ReduceFrom, x, axis)


def gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """[..., n, ...] -> [..., n * size, ...]; its gradient is summed over the axis and cut back."""
    return x if axis.size == 1 else _apply(_Gather, x, dim, axis)


def reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """[..., n, ...] -> [..., n / size, ...] of the sum over the axis; its gradient is gathered."""
    return x if axis.size == 1 else _apply(_ReduceScatter, x, dim, axis)


def all_to_all(x: Tensor, cut: int, joined: int, axis: Axis) -> Tensor:
    """[..., c, ..., j, ...] -> [..., c / size, ..., j * size, ...]; its gradient goes the same way back."""
    return x if axis.size == 1 else _apply(_AllToAll, x, cut, joined, axis)


def _apply(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    return function.apply(*arguments)
