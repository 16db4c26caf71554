"""Cross-entropy over a vocabulary cut over tensor-parallel ranks, fused with the output matmul.

Each rank computes the logits of its own rows (arXiv 1909.08053, section 3), and at most 2^27 of them at once: tokens go
through in chunks, and the gradients are formed in the forward pass while a chunk's logits are at hand, so that nothing
of size tokens x vocabulary waits for backward. At 8,192 tokens and 128,256 entries that saves 10 GB.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.config.schema import IGNORE_INDEX
from megallama.layout.counts import LOGITS_AT_ONCE
from megallama.parallel import types
from megallama.parallel.collectives import all_reduce
from megallama.parallel.mesh import Axis


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, first: int, real_rows: int, tp: Axis
) -> Tensor:
    """The sum over positions of -log softmax(hidden weight^T)[label], in fp32 (fp64 for fp64 inputs).

    hidden [tokens, hidden] and labels [tokens] are equal on all tp ranks; weight [rows, hidden] is this rank's rows,
    which stand for tokens first ... first + real_rows - 1, the rest being padding. Positions labelled IGNORE_INDEX
    count nothing. The gradient of `hidden` is this rank's share: `copy_to` or `gather` before this call sums it.
    """
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        hidden, weight, labels, first, real_rows, tp, torch.is_grad_enabled()
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, first: int, real_rows: int, tp: Axis, training: bool
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        by_hidden, by_weight = (training and asked for asked in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if by_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if by_weight else None
        chunk = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.t()).to(precise)
            losses = _softmax_in_place(logits, labels[part], first, real_rows, tp)
            total += losses.sum()
            grad_logits = logits.to(hidden.dtype) if training else logits
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[part]
        if training:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        by_hidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
        by_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        return by_hidden, by_weight, None, None, None, None, None

    @staticmethod
    def spmd_typecheck(*, hidden: Tensor, weight: Tensor, labels: Tensor, tp: Axis) -> types.Typed:
        hidden, labels = types.replicate(hidden, tp), types.replicate(labels, tp)
        shares = types.einsum("th,vh,t->", hidden, weight, labels)
        return types.sum_to_invariant(shares, tp)


def _softmax_in_place(logits: Tensor, labels: Tensor, first: int, real_rows: int, tp: Axis) -> Tensor:
    """Turn logits [tokens, rows] into softmax - onehot, their gradient; return the losses [tokens]."""
    logits[:, real_rows:] = float("-inf")
    logits -= all_reduce(logits.amax(dim=-1), tp, dist.ReduceOp.MAX)[:, None]

    local = labels - first
    elsewhere = (local < 0) | (local >= real_rows)
    local = local.masked_fill(elsewhere, 0)[:, None]
    target = logits.gather(1, local).squeeze(1).masked_fill(elsewhere, 0.0)
    logits.exp_()
    # One collective for both sums: these messages are so small that latency is all they cost.
    denominator, target = all_reduce(torch.stack([logits.sum(dim=-1), target]), tp)

    counts = labels != IGNORE_INDEX
    logits *= (counts / denominator)[:, None]
    logits.scatter_add_(1, local, -(counts & ~elsewhere).to(logits.dtype)[:, None])
    return (denominator.log() - target) * counts
