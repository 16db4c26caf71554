"""Linear layers and embedding cut over tensor-parallel ranks (arXiv 1909.08053, section 3).

With sequence parallelism (arXiv 2205.05198) activations between these layers are cut along the sequence. Hidden states
are [batch, sequence, hidden] throughout; `SEQUENCE` is their sequence dim. Weights are allocated, not initialised:
`parallel.init` fills them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megallama.parallel import types
from megallama.parallel.collectives import all_gather, copy_to, reduce_from, reduce_scatter, sum_scatter
from megallama.parallel.mesh import Axis
from megallama.parallel.shards import ShardSlice

SEQUENCE = 1
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


class ColumnParallelLinear(nn.Module):
    """Linear layers over one input, cut along their outputs and fused: one matmul for all of `outputs`.

    [batch, sequence (/ tp with sequence parallelism), in_features] -> [batch, sequence, sum(outputs) / tp]. `outputs`
    maps each logical layer to its out_features; tp must divide each.
    """

    def __init__(
        self, in_features: int, outputs: dict[str, int], tp: Axis, sequence_parallel: bool, part: GradientFilter
    ) -> None:
        super().__init__()
        assert all(width % tp.size == 0 for width in outputs.values())
        self.in_features, self.outputs, self.tp, self.sequence_parallel = in_features, outputs, tp, sequence_parallel
        self.part = part
        self.weight = _weight(sum(self.widths), in_features)

    @property
    def widths(self) -> list[int]:
        """This rank's out_features of each logical layer."""
        return [width // self.tp.size for width in self.outputs.values()]

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            result: Tensor = _GatherLinear.apply(x, self.weight, self.tp, self.part)  # type: ignore[no-untyped-call]
            return result
        return F.linear(copy_to(x, self.tp), self.weight)

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

    [batch, sequence, in_features / tp] -> [batch, sequence (/ tp with sequence parallelism), out_features].
    """

    def __init__(self, name: str, in_features: int, out_features: int, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        assert in_features % tp.size == 0
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
        return F.linear(x, self.weight)

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
    """tokens [batch, sequence] -> [batch, sequence (/ tp with sequence parallelism), hidden]."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__(name, vocab_size, hidden_size, tp)
        self.sequence_parallel = sequence_parallel

    def forward(self, tokens: Tensor) -> Tensor:
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

    Under sequence parallelism each rank sees a part of the sequence and so a part of the weight's gradient: the parts
    are summed here, inside autograd, so that ZeRO sees whole gradients.
    """

    def __init__(self, name: str, hidden_size: int, eps: float, tp: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        self.name, self.hidden_size, self.eps, self.tp = name, hidden_size, eps, tp
        self.sequence_parallel = sequence_parallel
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to(self.weight, self.tp) if self.sequence_parallel else self.weight
        return F.rms_norm(x, (self.hidden_size,), weight, self.eps)

    def pieces(self) -> tuple[ShardSlice, ...]:
        return (ShardSlice(self.name, (self.hidden_size,), (0,), (self.hidden_size,)),)


class _GatherLinear(torch.autograd.Function):
    """linear(gather(x), weight) that keeps x cut and gathers it again in backward.

    One more all-gather for 1/tp of the activation memory (arXiv 2205.05198, section 4.2.2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tp: Axis, part: GradientFilter) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp, ctx.part = tp, part
        return F.linear(all_gather(x, SEQUENCE, tp), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad, grad_x, grad_weight = grads[0], None, None
        if ctx.part.weights and ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, 1).t() @ all_gather(x, SEQUENCE, ctx.tp).flatten(0, 1)
        if ctx.part.inputs and ctx.needs_input_grad[0]:
            grad_x = sum_scatter(grad @ weight, SEQUENCE, ctx.tp)
        return grad_x, grad_weight, None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, weight: Tensor, tp: Axis) -> types.Typed:
        return types.einsum("bsi,oi->bso", types.gather_to_replicate(x, SEQUENCE, tp), weight)


def _weight(rows: int, columns: int) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(rows, columns))
    # DeepSpeed counts an unmarked parameter once over the tp ranks: unmarked shards make its norm silently wrong.
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    return weight
