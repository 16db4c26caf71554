"""The backward of each function is that of the types it declares: the checker takes its word for it.

All ranks are in one process, by torch's LocalTensor. A linear function f and its backward f' satisfy <f(x), g> =
<x, f'(g)>, where the product over the ranks is that of the type: once where tensor and gradient are the same on all
ranks, and else summed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import spmd_types
import torch
import torch.distributed as dist
from spmd_types import I, MeshAxis, V
from spmd_types.checker import typecheck
from torch import Tensor
from torch.distributed._local_tensor import LocalTensorMode

from megallama.model.layers import GradientFilter, column_linear
from megallama.model.tiled_mlp import _Kept, _TiledMLP
from megallama.parallel.collectives import Pending, all_to_all, copy_to, exchange, gather, reduce_from, reduce_scatter
from megallama.parallel.cross_entropy import _LinearCrossEntropy
from megallama.parallel.fake_world import fake_world
from megallama.parallel.mesh import Axis

RANKS = 3


def column(x: Tensor, weight: Tensor, axis: Axis, cut: bool = False) -> Tensor:
    return column_linear(x, weight, axis, cut, GradientFilter())


# The function, and the type and shape of each of its tensors.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[Any, tuple[int, ...]]]]] = {
    "copy_to": (copy_to, [(I, (2, 6))]),
    "reduce_from": (reduce_from, [(V, (2, 6))]),
    "gather dim 0": (lambda x, axis: gather(x, 0, axis), [(V, (2, 6))]),
    "gather dim 1": (lambda x, axis: gather(x, 1, axis), [(V, (2, 6))]),
    "reduce_scatter": (lambda x, axis: reduce_scatter(x, 1, axis), [(V, (2, 6))]),
    "all_to_all": (lambda x, axis: all_to_all(x, 1, 2, axis), [(V, (2, 6, 3))]),
    "column_linear": (column, [(I, (2, 6, 4)), (V, (5, 4))]),
    "column_linear cut": (partial(column, cut=True), [(V, (2, 6, 4)), (V, (5, 4))]),
}


def check(name: str) -> None:
    function, tensors = FUNCTIONS[name]
    with fake_world(RANKS, 0):
        axis = Axis(dist.new_group(list(range(RANKS))), 0, RANKS)
        along = MeshAxis.of(axis.group)
        with LocalTensorMode(RANKS) as mode, spmd_types.set_current_mesh({"tp": along}):
            given = []
            for number, (kind, shape) in enumerate(tensors):
                x = mode.rank_map(lambda rank, s=shape, n=number, k=kind: drawn(s, n, rank if k is V else 0))
                given.append(spmd_types.assert_type(x.requires_grad_(), {along: kind}))
            with typecheck(local=True):
                result = function(*given, axis)
            declared = spmd_types.get_axis_local_type(result, along)
            # The gradient of what is replicate is a share, and so is its own on each rank.
            grad = mode.rank_map(lambda rank: drawn(result.shape, 9, 0 if declared is I else rank))
            result.backward(grad)
            out = product(declared, values(result), values(grad))
            for (kind, _), x in zip(tensors, given, strict=True):
                assert product(kind, values(x), values(x.grad)) == pytest.approx(out, rel=1e-12)


def drawn(shape: tuple[int, ...], number: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def values(x: Any) -> list[Tensor]:
    return [x._local_tensors[rank].detach() for rank in range(RANKS)]


def product(kind: Any, x: list[Tensor], grad: list[Tensor]) -> float:
    if kind is not V:
        assert all(torch.equal(x[0], other) for other in x)
    if kind is I:
        torch.testing.assert_close(grad[1:], [grad[0]] * (RANKS - 1))
        return float((x[0] * grad[0]).sum())
    return float(sum((a * b).sum() for a, b in zip(x, grad, strict=True)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backward_is_that_of_the_declared_types(name: str) -> None:
    check(name)


def own_part(x: Tensor, dim: int, axis: Axis) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank]


def swapped(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """Of the right shape, and of the wrong ranks."""
    return exchange(grad, ctx.joined, ctx.cut, ctx.axis).flip(ctx.cut), None, None, None


@pytest.mark.parametrize(
    ("name", "place", "broken"),
    [
        ("copy_to", "parallel.collectives._CopyTo.backward", staticmethod(lambda ctx, grad: (grad, None))),
        ("reduce_from", "parallel.collectives._ReduceFrom.backward", staticmethod(lambda ctx, grad: (grad / 3, None))),
        ("gather dim 1", "parallel.collectives.sum_scatter", own_part),
        ("reduce_scatter", "parallel.collectives.all_gather", lambda x, dim, axis: torch.cat([x] * axis.size, dim)),
        ("all_to_all", "parallel.collectives._AllToAll.backward", staticmethod(swapped)),
        ("column_linear", "model.layers.begin_sum", lambda x, axis: Pending(x, axis)),
        (
            "column_linear cut",
            "model.layers.begin_sum_scatter",
            lambda x, axis: Pending(own_part(x, 0, axis), axis),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "." not in value else "",
)
def test_another_backward_is_found(monkeypatch: pytest.MonkeyPatch, name: str, place: str, broken: Any) -> None:
    monkeypatch.setattr(f"megallama.{place}", broken)
    with pytest.raises(AssertionError):
        check(name)


def test_every_function_is_here() -> None:
    """But for what is not linear: the loss and MLPs in tiles, whose gradients tests/model holds."""
    ours = {
        each.__name__
        for each in torch.autograd.Function.__subclasses__()
        if each.__module__.startswith(("megallama.model", "megallama.parallel"))
    } - {each.__name__ for each in (_LinearCrossEntropy, _TiledMLP, _Kept)}
    assert ours == {"_" + name.split()[0].title().replace("_", "") for name in FUNCTIONS}
