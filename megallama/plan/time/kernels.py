"""What the kernels of one micro-batch compute and move, on a rank at each place of the pipeline. Pure.

All of it is counted: tests hold the counts against those of MFU, and nothing here is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megallama.plan.time.workload import Shape, Workload

SWIGLU_ELEMENTS = 14
"""Read and written by torch's own kernels of silu and product for each of theirs, forward (5) and backward (9)."""

# Bytes per element in which the constants below are counted.
_BF16 = 2


@dataclass(frozen=True)
class KernelWork:
    """One micro-batch on one rank, forward and backward, with what is computed again."""

    matmul_flops: float
    attention_flops: float
    """As a causal kernel computes them."""
    matmul_bytes: float
    """Read and written by matmuls."""
    other_bytes: float
    """Read and written by norms, rotations, activations and the loss."""


def kernel_work(work: Workload) -> list[KernelWork]:
    """The work of each pipeline rank."""
    layer, head = _layer(work), _head(work)
    return [_sum(layer, layers, head if rank == work.head else None) for rank, layers in enumerate(work.stages)]


def _sum(layer: KernelWork, layers: int, head: KernelWork | None) -> KernelWork:
    """The work of so many layers, and of the head where the rank has it."""
    return KernelWork(
        matmul_flops=layers * layer.matmul_flops + (head.matmul_flops if head else 0),
        attention_flops=layers * layer.attention_flops,
        matmul_bytes=layers * layer.matmul_bytes + (head.matmul_bytes if head else 0),
        other_bytes=layers * layer.other_bytes + (head.other_bytes if head else 0),
    )


def _layer(work: Workload) -> KernelWork:
    shape, tp, tokens = work.shape, work.tp, work.micro_batch_size * work.sequence_length
    passes = 3 + work.matmul_recompute_fraction
    return KernelWork(
        matmul_flops=tokens * 2 * passes * shape.matmul_per_layer / tp,
        # A causal kernel does half of the square, and flash attention's backward 2.5 times the work of its forward,
        # since it computes the scores again (arXiv 2205.14135, appendix B).
        attention_flops=tokens
        * (7 + 2 * work.attention_recompute_fraction)
        * shape.query_width
        * work.sequence_length
        / tp,
        matmul_bytes=passes * _moved(work, _layer_matmuls(shape, tp)),
        other_bytes=tokens * (_layer_bytes(work) + _bytes_again(work)) * work.element_bytes / _BF16,
    )


def _head(work: Workload) -> KernelWork:
    shape, tp, tokens = work.shape, work.tp, work.micro_batch_size * work.sequence_length
    return KernelWork(
        matmul_flops=tokens * 6 * shape.head / tp,
        attention_flops=0,
        matmul_bytes=3 * _moved(work, [(shape.hidden_size, shape.rows / tp)]),
        other_bytes=tokens * _loss_bytes(work) * work.element_bytes / _BF16,
    )


def _layer_matmuls(shape: Shape, tp: int) -> Iterator[tuple[float, float]]:
    """(inputs, outputs) of one layer's matmuls on a tensor-parallel rank; queries with keys, gate with up fused."""
    inner = shape.intermediate_size / tp
    yield shape.hidden_size, (shape.query_width + 2 * shape.kv_width) / tp
    yield shape.query_width / tp, shape.hidden_size
    yield shape.hidden_size, (shape.mlp_matrices - 1) * inner
    yield inner, shape.hidden_size


def _moved(work: Workload, matmuls: Iterable[tuple[float, float]]) -> float:
    """Bytes that one pass over each of these moves: its three matrices, once."""
    tokens = work.micro_batch_size * work.sequence_length
    return work.element_bytes * sum(tokens * (inputs + outputs) + inputs * outputs for inputs, outputs in matmuls)


def _loss_bytes(work: Workload) -> float:
    """Bytes per token of the loss.

    Fused: logits are read twice forward, read and written backward. As kernels of their own in fp32: cast 6 bytes per
    logit, maximum 4, difference 8, exponential 8, sum 4, quotient 8, gradient 8, cast back 6.
    """
    return (8 if work.fused_loss else 52) * work.shape.rows / work.tp


def _bytes_again(work: Workload) -> float:
    """Bytes per token of what backward computes again in one layer: a third of all, or SwiGLU's forward."""
    activation = (6 if work.fused else 10) * work.shape.intermediate_size / work.tp
    return (
        work.elementwise_recompute_fraction * _layer_bytes(work) / 3 + work.activation_recompute_fraction * activation
    )


def _layer_bytes(work: Workload) -> float:
    """Bytes per token of the other kernels of one layer, forward and backward.

    Fused: each of two norms with its residual sum reads and writes 4 vectors, as its backward does; a rotation and its
    backward read and write once; SwiGLU reads 2 and writes 1, its backward reads 3 and writes 2. As kernels of their
    own silu and product move 5 vectors, and backward 9; the rotation in fp32 takes 20 bytes per element and a norm in
    fp32 42 with its sum, and backward twice that. A norm that is one kernel moves 2 and 3, and sums in both ways 3.
    """
    shape = work.shape
    heads, gated = shape.query_width + shape.kv_width, shape.mlp_matrices == 3
    if work.fused:
        norms, inner = 32 * shape.hidden_size, 8 * heads + (16 if gated else 10) * shape.intermediate_size
    else:
        norms = (44 if work.fused_norm else 252) * shape.hidden_size
        inner = 60 * heads + 2 * SWIGLU_ELEMENTS * shape.intermediate_size
    return norms / (work.tp if work.sequence_parallel else 1) + inner / work.tp
