"""Linear layers and embedding cut over tensor-parallel ranks (arXiv 1909.08053, section 3).

With sequence parallelism (arXiv 2205.05198) activations between these layers are cut along the sequence. Hidden states
are [sequence, batch, hidden] throughout, so that what a rank has of them is one piece of memory, and no collective
copies it. Weights are allocated, not initialised: `model.init` fills them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megallama.parallel import types
from megallama.parallel.collectives import (
    all_gather,
    begin_all_gather,
    begin_sum,
    begin_sum_scatter,
    reduce_from,
    reduce_scatter,
)
from megallama.parallel.mesh import ALONE, Axis
from megallama.parallel.shards import ShardSlice

SEQUENCE = 0
"""The sequence dim of hidden states."""
VOCABULARY_MULTIPLE = 128


class GradientFilter:
    """Which gradients a backward is after, where a pipeline schedule runs that of the inputs apart from the weights'.

    torch's own operations are told which of their gradients are asked for. A function in Python is not, and would
    compute both in each part: it looks here.
    """

    def __init__(self) -> None:
        self.inputs = self.weights = True

    @contextmanager
    def only(self, which: Literal["inputs", "weights"]) -> Iterator[None]:
        """Inside, backward computes the gradients of `which` alone."""
        self.inputs, self.weights = which == "inputs", which == "weights"
        try:
            yield
        finally:
            self.inputs = self.weights = True


class Matmuls:
    """The three matrix products of a linear layer, in the type of its weight [out, in]."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, weight)

    def by_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        """[..., out] -> [..., in]: the gradient of the input."""
        return grad @ weight

    def by_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        """[..., out], [..., in] -> [out, in]: the gradient of the weight."""
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)


IN_DTYPE = Matmuls()


class ColumnParallelLinear(nn.Module):
    """Linear layers over one input, cut along their outputs and fused: one matmul for all of `outputs`.

    [sequence (/ tp with sequence parallelism), batch, in_features] -> [sequence, batch, sum(outputs) / tp]. `outputs`
    maps each logical layer to its out_features; tp must divide each.
    """

    def __init__(
        self, in_features: int, outputs: dict[str, int], tp: Axis, sequence_parallel: bool, part: GradientFilter
    ) -> None:
        super().__init__()
        assert all(width % tp.size == 0 for width in outputs.values())
        self.in_features, self.outputs, self.tp, self.sequence_parallel = in_features, outputs, tp, sequence_parallel
        self.part, self.matmuls = part, IN_DTYPE
        self.weight = _weight(sum(self.widths), in_features)

    @property
    def widths(self) -> list[int]:
        """This rank's out_features of each logical layer."""
        return [width // self.tp.size for width in self.outputs.values()]

    def forward(self, x: Tensor) -> Tensor:
        return column_linear(x, self.weight, self.tp, self.sequence_parallel, self.part, self.matmuls)

    def pieces(self) -> tuple[ShardSlice, ...]:
        found, row = [], 0
        for (name, total), width in zip(self.outputs.items(), self.widths, strict=True):
            cut = (self.tp.rank * width, 0)
            found.append(ShardSlice(name, (total, self.in_features), cut, (width, self.in_features), row))
            row += width
        return tuple(found)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.outputs}, tp {self.tp.rank}/{self.tp.size}"


class RowParallelLinear(nn.Module):
    """Linear layer cut along its input; the partial sums meet in one collective.

    [sequence, batch, in_features / tp] -> [sequence (/ tp with sequence parallelism), batch, out_features].
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        tp: Axis,
        sequence_parallel: bool,
        part: GradientFilter,
    ) -> None:
        super().__init__()
        assert in_features % tp.size == 0
        self.part, self.matmuls = part, IN_DTYPE
        self.name, self.in_features, self.out_features = name, in_features, out_features
        self.tp, self.sequence_parallel = tp, sequence_parallel
        self.weight = _weight(out_features, in_features // tp.size)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.matmul(x))

    def reduce(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' shares."""
        if self.sequence_parallel:
            return reduce_scatter(partial, SEQUENCE, self.tp)
        return reduce_from(partial, self.tp)

    def matmul(self, x: Tensor) -> Tensor:
        """This rank's share of the sum."""
        return column_linear(x, self.weight, ALONE, False, self.part, self.matmuls)

    def pieces(self) -> tuple[ShardSlice, ...]:
        width = self.in_features // self.tp.size
        whole, cut = (self.out_features, self.in_features), (0, self.tp.rank * width)
        return (ShardSlice(self.name, whole, cut, (self.out_features, width)),)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, tp {self.tp.rank}/{self.tp.size}"


class VocabParallel(nn.Module):
    """A [vocabulary, hidden] matrix cut along the vocabulary, padded to a multiple of 128 * tp.

    The padding keeps matmuls aligned; it stays zero, out of every softmax, and out of every checkpoint.
    """

    def __init__(self, name: str, vocab_size: int, hidden_size: int, tp: Axis) -> None:
        super().__init__()
        multiple = VOCABULARY_MULTIPLE * tp.size
        self.rows = -(-vocab_size // multiple) * VOCABULARY_MULTIPLE
        self.name, self.vocab_size, self.hidden_size, self.tp = name, vocab_size, hidden_size, tp
        self.first = tp.rank * self.rows
        self.weight = _weight(self.rows, hidden_size)

    @property
    def real_rows(self) -> int:
        """Rows on this rank that stand for a token."""
        return max(0, min(self.rows, self.vocab_size - self.first))

    def pieces(self) -> tuple[ShardSlice, ...]:
        if not self.real_rows:
            return ()
        whole, size = (self.vocab_size, self.hidden_size), (self.real_rows, self.hidden_size)
        return (ShardSlice(self.name, whole, (self.first, 0), size),)

    def extra_repr(self) -> str:
        return f"{self.vocab_size} x {self.hidden_size}, {self.rows} rows here, tp {self.tp.rank}/{self.tp.size}"


class VocabParallelEmbedding(VocabParallel):
    """tokens [batch, sequence] -> [sequence (/ tp with sequence parallelism), batch, hidden]."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__(name, vocab_size, hidden_size, tp)
        self.sequence_parallel = sequence_parallel

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.t()
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        partial = F.embedding(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[..., None], 0.0)
        if self.sequence_parallel:
            return reduce_scatter(partial, SEQUENCE, self.tp)
        return reduce_from(partial, self.tp)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dim, computed in fp32; its weight is on every rank.

    Where ranks see parts of what is normalised, of the sequence or of the heads, each has a `share` of the weight's
    gradient. Whoever trains sums the shares once per step, and finds such weights by the mark `has_share_of_gradient`.
    """

    def __init__(self, name: str, width: int, eps: float, share: bool) -> None:
        super().__init__()
        self.name, self.width, self.eps = name, width, eps
        self.weight = nn.Parameter(torch.empty(width))
        if share:
            self.weight.has_share_of_gradient = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.weight, self.eps)

    def pieces(self) -> tuple[ShardSlice, ...]:
        return (ShardSlice(self.name, (self.width,), (0,), (self.width,)),)


def column_linear(
    x: Tensor, weight: Tensor, tp: Axis, cut: bool, part: GradientFilter, matmuls: Matmuls = IN_DTYPE
) -> Tensor:
    """linear(x, weight), where x is the same on all ranks, or `cut` along the sequence and gathered.

    The gradient of x is summed over the ranks, and cut as x is. A cut x is kept cut and gathered again in backward: one
    more all-gather for 1/tp of the activation memory (arXiv 2205.05198, section 4.2.2).
    """
    if tp.size == 1 and matmuls is IN_DTYPE:
        return F.linear(x, weight)
    result: Tensor = _ColumnLinear.apply(x, weight, tp, cut, part, matmuls)  # type: ignore[no-untyped-call]
    return result


class _ColumnLinear(torch.autograd.Function):
    """In backward each collective runs beside a matmul that does not need it, as in Megatron-LM."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, tp: Axis, cut: bool, part: GradientFilter, matmuls: Matmuls
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp, ctx.cut, ctx.part, ctx.matmuls = tp, cut and tp.size > 1, part, matmuls
        return matmuls.forward(all_gather(x, SEQUENCE, tp) if cut else x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (x, weight), tp, grad = ctx.saved_tensors, ctx.tp, grads[0]
        by_x = ctx.part.inputs and ctx.needs_input_grad[0]
        by_weight = ctx.part.weights and ctx.needs_input_grad[1]
        gathered = begin_all_gather(x, tp) if by_weight and ctx.cut else None
        grad_x = ctx.matmuls.by_input(grad, weight) if by_x else None
        summed = None
        if grad_x is not None and tp.size > 1:
            summed = (begin_sum_scatter if ctx.cut else begin_sum)(grad_x, tp)
        grad_weight = None
        if by_weight:
            grad_weight = ctx.matmuls.by_weight(grad, x if gathered is None else gathered.wait())
        return grad_x if summed is None else summed.wait(), grad_weight, None, None, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, weight: Tensor, tp: Axis, cut: bool) -> types.Typed:
        if tp.size == 1:
            return types.einsum("sbi,oi->sbo", x, weight)
        whole = types.gather_to_replicate(x, SEQUENCE, tp) if cut else types.invariant_to_replicate(x, tp)
        return types.einsum("sbi,oi->sbo", whole, weight)


def _weight(rows: int, columns: int) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(rows, columns))
    # The norm counts an unmarked parameter on the first tp rank alone: of unmarked shards it would be silently wrong.
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    return weight
