"""A Llama of a wanted size, cut as published Llamas are. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megallama.errors import UserError
from megallama.layout.counts import count_parameters

# A shape is as large as wanted up to this.
TOLERANCE = 0.02
# hidden_size / num_hidden_layers of published Llamas: from 19 (SmolLM 135M: 576 / 30) to 130 (Llama 3.1 405B:
# 16384 / 126), with most above 1e9 parameters between 102 and 128.
ASPECTS = (19, 131)
# intermediate_size / hidden_size: from 8/3 (Llama 1, Llama 3.2 3B) to 4 (Llama 3.2 1B), rounding included.
WIDTHS = (2.6, 4.0)
LAYERS = range(2, 257, 2)
# About where Llama 3.2 3B begins to have 8 KV heads and heads of 128; below it heads of 64, as in Llama 3.2 1B, make
# more of them, for tp to divide, and every query head has its own KV head, as in Llama 2 up to 13B.
GROUPED_HEADS = 3.15e9
KV_HEADS = 8
TIED_BELOW = 2e9
# tp divides heads, and goes up to the 8 GPUs of a node: heads of another size (48 as in stories15M, 80 as in Phi-2) are
# better than a number of heads that 8 does not divide.
_HEADS = {8: (64, 48, 80, 32, 56, 40), 4: (64,), 2: (64,), 1: (64,)}
_GROUPED_HEADS = {8: (128,)}


@dataclass(frozen=True)
class LlamaShape:
    """The keys of the section `model` that size it, under the same names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Size of one head."""
        return self.head_dim

    @property
    def mlp_matrices(self) -> int:
        """Matrices of the MLP."""
        return 3

    @property
    def parameters(self) -> int:
        """All weights, the vocabulary unpadded."""
        return count_parameters(self).total

    @property
    def largest_tensor(self) -> int:
        """The largest tp up to 8 that divides heads, KV heads and intermediate_size."""
        return math.gcd(8, self.num_attention_heads, self.num_key_value_heads, self.intermediate_size)


@dataclass(frozen=True)
class _Wanted:
    """What every candidate for one size has in common."""

    parameters: float
    vocab_size: int
    tied: bool

    @property
    def grouped(self) -> bool:
        return self.parameters >= GROUPED_HEADS

    @property
    def width(self) -> float:
        """The usual intermediate_size / hidden_size: 8/3 as in Llama 1, or 3.5 where fewer KV heads leave room."""
        return 3.5 if self.grouped else 8 / 3

    @property
    def aspect(self) -> int:
        """The usual hidden_size / num_hidden_layers."""
        return 112 if self.parameters >= 1e9 else 64

    @property
    def head_dim(self) -> int:
        """The usual size of a head."""
        return 128 if self.grouped else 64


def find_shape(parameters: float, vocab_size: int, tied: bool | None = None) -> LlamaShape:
    """The most usual Llama within 2 % of `parameters`; embedding and head are one below 2e9 unless `tied` says.

    Heads, KV heads and intermediate_size are multiples of 8 where the size allows it, so tp may be 1, 2, 4 or 8, and
    layers are even, of 8 where that costs little. UserError with the nearest sizes where there is no such shape.
    """
    wanted = _Wanted(parameters, vocab_size, parameters < TIED_BELOW if tied is None else tied)
    sizes: list[int] = []
    for multiple, head_dims in (_GROUPED_HEADS if wanted.grouped else _HEADS).items():
        shapes = [shape for head_dim in head_dims for shape in _shapes(wanted, head_dim, multiple)]
        fitting = [shape for shape in shapes if abs(_error(wanted, shape)) <= TOLERANCE]
        if fitting:
            return min(fitting, key=lambda shape: (_strangeness(wanted, shape), shape.num_hidden_layers))
        sizes += [shape.parameters for shape in shapes]
    below, above = [n for n in sizes if n < parameters], [n for n in sizes if n > parameters]
    nearest = [*([max(below)] if below else []), *([min(above)] if above else [])]
    raise UserError(
        f"{parameters:.4g} parameters have no Llama shape within {TOLERANCE:.0%} for a vocabulary of {vocab_size}"
        f"{', tied' if wanted.tied else ''}; nearest: {' or '.join(f'{n:.4g}' for n in nearest)} parameters"
    )


def _shapes(wanted: _Wanted, head_dim: int, multiple: int) -> Iterator[LlamaShape]:
    """For each even depth and each hidden size of `multiple` heads of usual aspect, the nearest intermediate_size."""
    step = multiple * head_dim
    for layers in LAYERS:
        first, last = -(-ASPECTS[0] * layers // step) * step, ASPECTS[1] * layers // step * step
        for hidden in range(first, last + 1, step):
            narrowest, widest, unit = _widths(hidden)
            thinnest = _shape(wanted, layers, hidden, narrowest, head_dim)
            missing = wanted.parameters - thinnest.parameters
            width = narrowest + round(missing / (3 * layers * hidden) / unit) * unit
            yield replace(thinnest, intermediate_size=min(max(width, narrowest), widest))
            if missing < 0 and hidden == first:
                return  # Deeper ones are too large as well.
            if missing < 0:
                break  # So are wider ones.


def _widths(hidden: int) -> tuple[int, int, int]:
    """The least and the largest intermediate_size, and the step between them."""
    # Whole tiles of a matmul for large models; small ones need finer steps to meet their size.
    unit = 256 if hidden >= 1024 else 64
    return math.ceil(WIDTHS[0] * hidden / unit) * unit, math.floor(WIDTHS[1] * hidden / unit) * unit, unit


def _shape(wanted: _Wanted, layers: int, hidden: int, width: int, head_dim: int) -> LlamaShape:
    heads = hidden // head_dim
    return LlamaShape(
        vocab_size=wanted.vocab_size,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=KV_HEADS if wanted.grouped else heads,
        head_dim=head_dim,
        tie_word_embeddings=wanted.tied,
    )


def _error(wanted: _Wanted, shape: LlamaShape) -> float:
    return shape.parameters / wanted.parameters - 1


def _strangeness(wanted: _Wanted, shape: LlamaShape) -> float:
    """How far a shape is from the usual: in e-folds of aspect, width and head, and error of its size."""
    aspect = math.log(shape.hidden_size / shape.num_hidden_layers / wanted.aspect)
    width = math.log(shape.intermediate_size / shape.hidden_size / wanted.width)
    head = 3 * math.log(shape.head_dim / wanted.head_dim)
    uneven = 0.05 * (shape.num_hidden_layers % 8 > 0) + 0.05 * (shape.num_hidden_layers % 4 > 0)
    return abs(aspect) + abs(width) + abs(head) + 5 * abs(_error(wanted, shape)) + uneven
