"""Cross-entropy over a vocabulary cut over tensor-parallel ranks, fused with the output matmul.

Each rank computes the logits of its own rows (arXiv 1909.08053, section 3), and at most half a GiB of them at once:
tokens go through in chunks, and the gradients are formed in the forward pass while a chunk's logits are at hand, so
that nothing of size tokens x vocabulary waits for backward. At 8,192 tokens and 128,256 entries that saves 10 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.config.schema import IGNORE_INDEX
from megallama.layout.counts import logits_at_once
from megallama.parallel import types
from megallama.parallel.collectives import all_reduce
from megallama.parallel.mesh import Axis


@dataclass(frozen=True)
class SoftmaxKernels:
    """The two passes over a chunk of logits [tokens, rows], around the collectives in which ranks share the sums.

    In torch's own kernels each operation reads all and writes all, in place. Compiled, a pass is one kernel or two, and
    takes logits in the type of the matmul: 8 bytes a logit in bf16 instead of 50.
    """

    statistics: Callable[[Tensor], tuple[Tensor, Tensor]]
    """The largest logit of each token [tokens], and the sum of exp(logit - largest)."""
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Logits as `statistics` left them, `largest` and a factor for each token: exp(logit - largest) * factor."""
    in_place: bool


def _largest(logits: Tensor) -> Tensor:
    """Finite on a rank that has only padding, too: what is subtracted from it must not be infinite as well."""
    return logits.amax(dim=-1).clamp(min=torch.finfo(logits.dtype).min)


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    largest = _largest(logits)
    logits -= largest[:, None]
    return largest, logits.exp_().sum(dim=-1)


def _scaled(exponentials: Tensor, _: Tensor, factor: Tensor) -> Tensor:
    return exponentials.mul_(factor[:, None])


def _statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = _largest(precise)
    return largest, (precise - largest[:, None]).exp().sum(dim=-1)


def _softmax(logits: Tensor, largest: Tensor, factor: Tensor) -> Tensor:
    return logits.copy_((logits.to(largest.dtype) - largest[:, None]).exp() * factor[:, None])


IN_PLACE = SoftmaxKernels(_exponentials, _scaled, in_place=True)


@cache
def compiled_kernels() -> SoftmaxKernels:
    """Compiled when they are first called, and once more for a last chunk of another size."""
    return SoftmaxKernels(torch.compile(_statistics), torch.compile(_softmax), in_place=False)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int,
    real_rows: int,
    tp: Axis,
    z_loss: float = 0.0,
    kernels: SoftmaxKernels = IN_PLACE,
) -> Tensor:
    """The sum over positions of -log softmax(hidden weight^T)[label], in fp32 (fp64 for fp64 inputs).

    hidden [tokens, hidden] and labels [tokens] are equal on all tp ranks; weight [rows, hidden] is this rank's rows,
    which stand for tokens first ... first + real_rows - 1, the rest being padding. Positions labelled IGNORE_INDEX
    count nothing. The gradient of `hidden` is this rank's share: `copy_to` or `gather` before this call sums it.

    The gradients are those of -log softmax + z_loss * log(sum of exp(logits))^2, whose second term keeps logits from
    drifting (arXiv 2204.02311, section 5). The value is without it, so that it compares whatever `z_loss` is.
    """
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        hidden, weight, labels, first, real_rows, tp, z_loss, kernels, torch.is_grad_enabled()
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        first: int,
        real_rows: int,
        tp: Axis,
        z_loss: float,
        kernels: SoftmaxKernels,
        training: bool,
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        by_hidden, by_weight = (training and asked for asked in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if by_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if by_weight else None
        chunk = max(1, logits_at_once(4 if kernels.in_place else hidden.element_size()) // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight.t()
            logits = logits.to(precise) if kernels.in_place else logits
            losses = _softmax_in_place(logits, labels[part], first, real_rows, tp, z_loss, kernels, training)
            total += losses.sum()
            grad_logits = logits.to(hidden.dtype) if training else logits
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None and grad_weight.dtype == grad_logits.dtype:
                torch.addmm(grad_weight, grad_logits.t(), hidden[part], out=grad_weight)  # no product beside the sum
            elif grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[part]
            del logits, grad_logits  # before those of the next chunk
        if training:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        by_hidden = None
        if grad_hidden is not None:
            # In fp32: a scale that is rounded to bf16 would be off by one factor for all, another one at another dp.
            by_hidden = torch.mul(grad_hidden, scale.view(1), out=torch.empty_like(grad_hidden))
        by_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        return by_hidden, by_weight, None, None, None, None, None, None, None

    @staticmethod
    def spmd_typecheck(*, hidden: Tensor, weight: Tensor, labels: Tensor, tp: Axis) -> types.Typed:
        hidden, labels = types.replicate(hidden, tp), types.replicate(labels, tp)
        shares = types.einsum("th,vh,t->", hidden, weight, labels)
        return types.sum_to_invariant(shares, tp)


def _softmax_in_place(
    logits: Tensor,
    labels: Tensor,
    first: int,
    real_rows: int,
    tp: Axis,
    z_loss: float,
    kernels: SoftmaxKernels,
    training: bool,
) -> Tensor:
    """Turn logits [tokens, rows] into their gradient, when `training`; return the losses [tokens].

    The gradient is softmax - onehot, and of z_loss * log(z)^2, where z is the sum of exp(logits), the softmax times
    2 * z_loss * log(z).
    """
    logits[:, real_rows:] = float("-inf")
    local = labels - first
    elsewhere = (local < 0) | (local >= real_rows)
    local = local.masked_fill(elsewhere, 0)[:, None]
    target = logits.gather(1, local).squeeze(1).masked_fill(elsewhere, 0.0)

    own_largest, own_sum = kernels.statistics(logits)
    largest = all_reduce(own_largest, tp, dist.ReduceOp.MAX)
    own_sum = own_sum * (own_largest - largest).exp()
    # One collective for both sums: these messages are so small that latency is all they cost.
    total, target = all_reduce(torch.stack([own_sum, target.to(own_sum.dtype)]), tp)

    counts, log_total = (labels != IGNORE_INDEX).to(total.dtype), total.log() + largest
    if training:
        softmaxes = counts * (1 + 2 * z_loss * log_total)
        kernels.gradient(logits, own_largest, softmaxes * (own_largest - log_total).exp())
        # A softmax near 1 that is rounded to bf16 would leave nothing of the difference.
        onehot = (softmaxes * (target - log_total).exp() - counts).to(logits.dtype)
        logits.scatter_(1, local, torch.where(elsewhere, logits.gather(1, local).squeeze(1), onehot)[:, None])
    return (log_total - target) * counts
