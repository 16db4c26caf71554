"""What the kernels of one micro-batch compute and move on a rank, layer by layer. Pure.

All of it is counted: tests hold the counts against those of MFU, and nothing here is fitted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import astuple, dataclass

from megallama.config.schema import RunConfig
from megallama.layout.counts import kernel_convention
from megallama.layout.frozen import frozen_shapes
from megallama.layout.stages import Stage
from megallama.plan.memory.activations import Tensors
from megallama.plan.time.software import Software

SWIGLU_ELEMENTS = 14
"""Read and written by torch's own kernels of silu and product for each of theirs, forward (5) and backward (9)."""

# Bytes per element in which the constants below are counted.
_BF16 = 2


@dataclass(frozen=True)
class KernelWork:
    """One micro-batch on one rank, forward and backward, with what is computed again."""

    matmul_flops: float = 0.0
    """In the type of the run."""
    fp8_flops: float = 0.0
    """Of matmuls in fp8."""
    attention_flops: float = 0.0
    """As the kernel computes them."""
    bytes_moved: float = 0.0
    """Read and written by matmuls, norms, rotations, activations and the loss."""

    def __add__(self, other: KernelWork) -> KernelWork:
        return KernelWork(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def times(self, count: int) -> KernelWork:
        """The work of so many."""
        return KernelWork(*(count * each for each in astuple(self)))


def layer_work(config: RunConfig, of: Tensors, software: Software) -> KernelWork:
    """The work of a decoder layer; `of` has the sizes on the rank.

    A causal kernel does half of the square and that of a masked model all of it; flash attention's backward does 2.5
    times the work of its forward, since it computes the scores again (arXiv 2205.14135, appendix B).
    """
    again = software.recomputed(config)
    elementwise = _layer_bytes(config, of, software)
    attended = of.sequence if kernel_convention(config.train.objective) == "causal" else 2 * of.sequence
    activation = (6 if software.fuses("kernels", config) else 10) * of.width
    norms = 8 * of.hidden * of.between / of.positions if of.compiled else 0  # compile_keeping_little
    extra = again.elementwise * elementwise / 3 + again.activation * (activation + norms)
    return _decoder_matmuls(config, of, software, _layer_matmuls(of).values(), 3 + again.matmul) + KernelWork(
        attention_flops=of.positions * (7 + 2 * again.attention) * of.query * attended,
        bytes_moved=of.positions * (elementwise + extra) * of.element / _BF16,
    )


def head_work(config: RunConfig, of: Tensors, software: Software) -> KernelWork:
    """The work of the output head and the loss.

    A fused loss reads logits twice forward, and reads and writes them backward. As kernels of their own in fp32: cast 6
    bytes per logit, maximum 4, difference 8, exponential 8, sum 4, quotient 8, gradient 8, cast back 6.
    """
    loss = (8 if software.fuses("loss", config) else 52) * of.rows
    beside = KernelWork(bytes_moved=of.positions * loss * of.element / _BF16)
    return _matmul_work(of, [(of.hidden, of.rows)], 3) + beside


def spared_work(config: RunConfig, of: Tensors, software: Software, mine: Iterable[Stage], head: bool) -> KernelWork:
    """The work that frozen weights spare a rank with these stages, and perhaps the `head`: the pass for gradients."""
    if not config.train.freeze:
        return KernelWork()
    frozen = frozen_shapes(config.model, config.train.freeze)
    table = "model.embed_tokens" if config.model.tie_word_embeddings else "lm_head"
    found = _matmul_work(of, [(of.hidden, of.rows)], 1) if head and f"{table}.weight" in frozen else KernelWork()
    layers = [(i, name, sizes) for stage in mine for i in stage.layers for name, sizes in _layer_matmuls(of).items()]
    spared = [sizes for i, name, sizes in layers if f"model.layers.{i}.{name}.weight" in frozen]
    return found + _decoder_matmuls(config, of, software, spared, 1)


def _layer_matmuls(of: Tensors) -> dict[str, tuple[int, int]]:
    """Inputs and outputs, by a weight: queries with keys and values are one matmul, the gate with up another."""
    attention = {"self_attn.q_proj": (of.hidden, of.qkv), "self_attn.o_proj": (of.query, of.hidden)}
    return attention | {"mlp.up_proj": (of.hidden, of.up), "mlp.down_proj": (of.width, of.hidden)}


def _decoder_matmuls(
    config: RunConfig, of: Tensors, software: Software, matmuls: Collection[tuple[int, int]], passes: float
) -> KernelWork:
    """As `_matmul_work`; in fp8 each pass also scales its two factors and casts them.

    Fused: one kernel reads a factor for its largest number, one casts it (5 bytes), and half of the factors are copied
    for the order in which the kernel reads them (1). By kernels of their own absolute value, maximum and four steps of
    the cast move 33. A matmul then reads factors of one byte.
    """
    work = _matmul_work(of, matmuls, passes)
    if config.train.matmul == "dtype":
        return work
    factors = sum(of.positions * (inputs + outputs) + inputs * outputs for inputs, outputs in matmuls) * 2 / 3
    casts = (6 if software.fuses("kernels", config) else 34) - 1
    return KernelWork(fp8_flops=work.matmul_flops, bytes_moved=work.bytes_moved + passes * factors * casts)


def _matmul_work(of: Tensors, matmuls: Collection[tuple[int, int]], passes: float) -> KernelWork:
    """The work of so many passes over each of these: a pass moves its three matrices once."""
    flops = of.positions * 2 * passes * sum(inputs * outputs for inputs, outputs in matmuls)
    moved = of.element * sum(of.positions * (inputs + outputs) + inputs * outputs for inputs, outputs in matmuls)
    return KernelWork(matmul_flops=flops, bytes_moved=passes * moved)


def _layer_bytes(config: RunConfig, of: Tensors, software: Software) -> float:
    """Bytes per position of the other kernels of a layer, forward and backward.

    Fused: each of two norms with its residual sum reads and writes 4 vectors, as its backward does; a rotation and its
    backward read and write once; SwiGLU reads 2 and writes 1, its backward reads 3 and writes 2. As kernels of their
    own silu and product move 5 vectors, and backward 9; the rotation in fp32 takes 20 bytes per element and a norm in
    fp32 42 with its sum, and backward twice that. A norm that is one kernel moves 2 and 3, and sums in both ways 3.
    The norms of queries and keys have no sum. The activation of a GPT reads 1 vector and writes 1, its backward reads 2
    and writes 1; nothing is rotated.
    """
    llama = config.model.block == "llama"
    fused = software.fuses("kernels", config)
    norms = 32 if fused else 44 if of.fused_norm else 252
    rotated = (8 if fused else 60) * (of.query + of.key) if llama else 0
    normed = (10 if fused or of.fused_norm else 114) * (of.query + of.key) if of.qk_norm else 0
    activation = (16 if fused else 2 * SWIGLU_ELEMENTS) if llama else 10
    return norms * of.hidden * of.between / of.positions + normed + rotated + activation * of.width
