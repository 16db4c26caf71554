"""The MLP of a long sequence in tiles of tokens, for layers of which backward computes the forward again.

Gate, up and product take 4 * intermediate size elements per token, seven times a hidden state of Llama 3. Here at most
2^27 elements of gate and up are in memory at once, in forward and in backward, which forms them again tile by tile
(sequence tiling, arXiv 2506.13996). No matmul is done that recomputation would not do anyway, and with sequence
parallelism no tile has a collective of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.layout.counts import GATES_AT_ONCE
from megallama.model.layers import SEQUENCE, GradientFilter
from megallama.parallel import types
from megallama.parallel.collectives import all_gather, sum_scatter
from megallama.parallel.mesh import Axis


def tile(width: int) -> int:
    """The tokens whose gate and up, so wide together on a rank, are formed at once."""
    return max(1, GATES_AT_ONCE // width)


def tiled_mlp(x: Tensor, gate_up: Tensor, down: Tensor, axis: Axis, part: GradientFilter) -> Tensor:
    """down(silu(gate(x)) * up(x)) of this rank's weights.

    x [sequence / size of `axis`, batch, hidden] is gathered over `axis`; the result, [sequence, batch, hidden], is this
    rank's share of a sum. gate_up [2 * width, hidden], down [hidden, width]. Keeps x alone for backward, and sums the
    gradients of the weights over tiles in fp32.
    """
    kept: Tensor = _Kept.apply(x)  # type: ignore[no-untyped-call]
    result: Tensor = _TiledMLP.apply(kept, gate_up, down, kept.grad_fn, axis, part)  # type: ignore[no-untyped-call]
    return result


class _Kept(torch.autograd.Function):
    """Identity that keeps its input for the function after it.

    Recomputation stops when all that a layer keeps is there. A function keeps what it keeps after it has run: this one
    is done before the tiles begin, so that recomputation does not run them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]

    @staticmethod
    def spmd_typecheck(*, x: Tensor) -> types.Typed:
        return types.einsum("sbi->sbi", x)


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, kept: Any, axis: Axis, part: GradientFilter
    ) -> Tensor:
        if kept is None:  # no gradient of x is asked for
            ctx.save_for_backward(x)
        # The parameters themselves: under ZeRO 3 their memory comes and goes.
        ctx.kept, ctx.weights, ctx.axis, ctx.part = kept or ctx, (gate_up, down), axis, part
        whole = all_gather(x, SEQUENCE, axis)
        result = torch.empty_like(whole)
        for tokens, out in _tiles(gate_up, whole, result):
            gate, up = (tokens @ gate_up.t()).chunk(2, dim=-1)
            torch.mm(F.silu(gate) * up, down.t(), out=out)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, down = ctx.weights
        inputs = ctx.part.inputs and ctx.needs_input_grad[0]
        by_gate_up, by_down = (
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            if ctx.part.weights and asked
            else None
            for weight, asked in zip(ctx.weights, ctx.needs_input_grad[1:3], strict=True)
        )
        whole = all_gather(ctx.kept.saved_tensors[0], SEQUENCE, ctx.axis)
        by_x = torch.empty_like(whole) if inputs else None
        for tokens, grad, *out in _tiles(gate_up, whole, grads[0].contiguous(), *([] if by_x is None else [by_x])):
            gates = tokens @ gate_up.t()
            gate, up = gates.chunk(2, dim=-1)
            active = F.silu(gate)
            if by_down is not None:
                by_down += grad.t() @ (active * up)
            if by_x is None and by_gate_up is None:
                continue
            product = grad @ down
            # The gradients take the place of gate and up.
            up.mul_(product)
            gate.copy_(torch.ops.aten.silu_backward(up, gate))
            torch.mul(product, active, out=up)
            if by_gate_up is not None:
                by_gate_up += gates.t() @ tokens
            for rows in out:
                torch.mm(gates, gate_up, out=rows)
        whole_grad = None if by_x is None else sum_scatter(by_x, SEQUENCE, ctx.axis)
        return whole_grad, _like(by_gate_up, gate_up), _like(by_down, down), None, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, gate_up: Tensor, down: Tensor, axis: Axis) -> types.Typed:
        whole = x if axis.size == 1 else types.gather_to_replicate(x, SEQUENCE, axis)
        return types.einsum("sbi,wi,ow->sbo", whole, gate_up, down)


def _tiles(gate_up: Tensor, *tensors: Tensor) -> Any:
    """Of each [sequence, batch, hidden] the same tokens [tile, hidden], by reference."""
    return zip(*(tensor.flatten(0, 1).split(tile(gate_up.shape[0])) for tensor in tensors), strict=True)


def _like(gradient: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(weight.dtype)
