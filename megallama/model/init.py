"""Initial weights as a function of (seed, logical name, index), whatever the layout.

A logical tensor is drawn in tiles of 128 x 128, each from its own counter-based stream (Philox, Salmon et al., SC'11),
so a shard draws the tiles it touches and no more. Values are drawn in fp32 on the host: the same on CPU and CUDA.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megallama.parallel.shards import ShardSlice

TILE = 128

Scheme = Literal["normal", "kaiming_uniform", "xavier_uniform"]


@torch.no_grad()
def initialise(
    module: nn.Module,
    held: Mapping[str, Sequence[ShardSlice]],
    *,
    seed: int,
    num_layers: int,
    scheme: Scheme = "normal",
    std: float = 0.02,
) -> None:
    """Fill every parameter of `module`, which holds the pieces `held` by local name; padding rows become zero.

    normal: std, and std / sqrt(2 * num_layers) for the projections that write to the residual stream (GPT-2).
    kaiming_uniform: bound 1 / sqrt(fan_in), the default of nn.Linear. xavier_uniform: bound
    sqrt(6 / (fan_in + fan_out)). The uniform schemes keep the embedding normal. Norm weights are one.
    """
    for name, pieces in held.items():
        parameter = module.get_parameter(name)
        parameter.zero_()
        for piece in pieces:
            draw_piece(piece, piece.of(parameter), seed=seed, num_layers=num_layers, scheme=scheme, std=std)


def draw_piece(piece: ShardSlice, out: Tensor, *, seed: int, num_layers: int, scheme: Scheme, std: float) -> None:
    """Write the initial values of `piece` into `out`."""
    if len(piece.shape) == 1:
        out.fill_(1.0)
        return
    fan_out, fan_in = piece.shape
    if scheme == "normal" or "embed_tokens" in piece.name:
        writes_residual = piece.name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = std / math.sqrt(2 * num_layers) if writes_residual else std
        values = _draw(piece, seed, normal=True) * np.float32(scale)
    else:
        bound = 1 / math.sqrt(fan_in) if scheme == "kaiming_uniform" else math.sqrt(6 / (fan_in + fan_out))
        values = (_draw(piece, seed, normal=False) * 2 - 1) * np.float32(bound)
    out.copy_(torch.from_numpy(values))


def _draw(piece: ShardSlice, seed: int, *, normal: bool) -> NDArray[np.float32]:
    """The piece's part of a standard normal, or uniform in [0, 1), logical tensor."""
    digest = hashlib.sha256(f"{seed}:{piece.name}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    (top, left), (height, width) = piece.offset, piece.size
    values = np.empty((height, width), dtype=np.float32)
    for tile_row in range(top // TILE, -(-(top + height) // TILE)):
        for tile_column in range(left // TILE, -(-(left + width) // TILE)):
            # The low counter word belongs to the stream itself; the tile's place goes above it.
            counter = np.array([0, 0, tile_row, tile_column], dtype=np.uint64)
            stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
            shape = (TILE, TILE)
            tile = stream.standard_normal(shape, np.float32) if normal else stream.random(shape, np.float32)
            rows = slice(max(top, tile_row * TILE), min(top + height, (tile_row + 1) * TILE))
            columns = slice(max(left, tile_column * TILE), min(left + width, (tile_column + 1) * TILE))
            values[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = tile[
                rows.start - tile_row * TILE : rows.stop - tile_row * TILE,
                columns.start - tile_column * TILE : columns.stop - tile_column * TILE,
            ]
    return values
