"""Rotary position embedding (arXiv 2104.09864) in Hugging Face's rotate-half order, with Llama's two stretchings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from megallama.config.schema import ModelConfig


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position for each pair of channels: [head_dim / 2], fp64 on the CPU, whatever the default device.

    In fp32 the angle of position 131,071 would be wrong by up to 0.01.
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float64, device="cpu") / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # llama3: keep short wavelengths, stretch long ones, blend between; as published with Llama 3.1.
    original = scaling.original_max_position_embeddings
    turns = original * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for positions [..., sequence]: each [..., 1, sequence, head_dim], of fp64 angles, rounded to fp32."""
    angles = positions.to(frequencies.dtype)[..., None, :, None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, heads, sequence, head_dim] with each pair of channels turned by its angle, in fp32, then x's type."""
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


@cache
def compiled_rotate() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`rotate` as one kernel forward and one backward: 8 bytes an element in bf16 instead of 82."""
    return torch.compile(rotate)
