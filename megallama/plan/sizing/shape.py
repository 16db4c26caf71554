"""A Llama of a wanted size, cut as published Llamas are. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megallama.config.schema import ModelConfig
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


def find_shape(parameters: float, vocab_size: int) -> ModelConfig:
    """The most usual Llama within 2 % of `parameters`.

    Embedding and head are one below 2e9. Heads, KV heads and intermediate_size are multiples of 8 where the size allows
    it, so tp may be 1, 2, 4 or 8, and layers are even, of 8 where that costs little. UserError with the nearest sizes
    where there is no such shape.
    """
    sizes: list[int] = []
    for multiple, head_dims in (_GROUPED_HEADS if parameters >= GROUPED_HEADS else _HEADS).items():
        shapes = [each for head_dim in head_dims for each in _shapes(parameters, vocab_size, head_dim, multiple)]
        fitting = [shape for shape in shapes if abs(_size(shape) / parameters - 1) <= TOLERANCE]
        if fitting:
            return min(fitting, key=lambda shape: (_strangeness(parameters, shape), shape.num_hidden_layers))
        sizes += map(_size, shapes)
    below, above = [n for n in sizes if n < parameters], [n for n in sizes if n > parameters]
    nearest = [*([max(below)] if below else []), *([min(above)] if above else [])]
    raise UserError(
        f"{parameters:.4g} parameters have no Llama shape within {TOLERANCE:.0%} for a vocabulary of {vocab_size}; "
        f"nearest: {' or '.join(f'{n:.4g}' for n in nearest)} parameters"
    )


def _shapes(parameters: float, vocab_size: int, head_dim: int, multiple: int) -> Iterator[ModelConfig]:
    """For each even depth and each hidden size of `multiple` heads of usual aspect, the nearest intermediate_size."""
    step, grouped = multiple * head_dim, parameters >= GROUPED_HEADS
    for layers in LAYERS:
        first, last = -(-ASPECTS[0] * layers // step) * step, ASPECTS[1] * layers // step * step
        for hidden in range(first, last + 1, step):
            # Whole tiles of a matmul for large models; small ones need finer steps to meet their size.
            unit = 256 if hidden >= 1024 else 64
            narrowest, widest = (
                round_to(w * hidden / unit) * unit for round_to, w in zip((math.ceil, math.floor), WIDTHS, strict=True)
            )
            thinnest = ModelConfig.model_construct(
                vocab_size=vocab_size,
                hidden_size=hidden,
                intermediate_size=narrowest,
                num_hidden_layers=layers,
                num_attention_heads=hidden // head_dim,
                num_key_value_heads=KV_HEADS if grouped else hidden // head_dim,
                head_dim=head_dim,
                tie_word_embeddings=parameters < TIED_BELOW,
            )
            missing = parameters - _size(thinnest)
            width = narrowest + round(missing / (3 * layers * hidden) / unit) * unit
            yield thinnest.model_copy(update={"intermediate_size": min(max(width, narrowest), widest)})
            if missing < 0 and hidden == first:
                return  # Deeper ones are too large as well.
            if missing < 0:
                break  # So are wider ones.


def _size(shape: ModelConfig) -> int:
    return count_parameters(shape).total


def _strangeness(parameters: float, shape: ModelConfig) -> float:
    """How far a shape is from the usual: in e-folds of aspect, width and head, and error of its size."""
    grouped = parameters >= GROUPED_HEADS
    aspect = math.log(shape.hidden_size / shape.num_hidden_layers / (112 if parameters >= 1e9 else 64))
    # 8/3 as in Llama 1, or 3.5 where fewer KV heads leave room.
    width = math.log(shape.intermediate_size / shape.hidden_size / (3.5 if grouped else 8 / 3))
    head = 3 * math.log(shape.head_size / (128 if grouped else 64))
    uneven = 0.05 * (shape.num_hidden_layers % 8 > 0) + 0.05 * (shape.num_hidden_layers % 4 > 0)
    return abs(aspect) + abs(width) + abs(head) + 5 * abs(_size(shape) / parameters - 1) + uneven
