"""Initial weights as a function of (seed, logical name, index), whatever the layout.

A logical tensor is drawn in tiles of 128 x 128, each from its own counter-based stream (Philox, Salmon et al., SC'11),
so a shard draws the tiles it touches and no more. Values are drawn in fp32 on the host: the same on CPU and CUDA.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megallama.parallel.shards import ShardSlice, boxes

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


@torch.no_grad()
def initialise_owned(
    owned: Iterable[tuple[str, int, Tensor]],
    held: Mapping[str, Sequence[ShardSlice]],
    *,
    dtype: torch.dtype,
    threads: int,
    seed: int,
    num_layers: int,
    scheme: Scheme = "normal",
    std: float = 0.02,
) -> None:
    """The same values in flat fp32 ranges of parameters, rounded to `dtype`, drawn by so many threads.

    `owned` are the name of a parameter, the first element of a range of it, and its tensor; what no piece covers in it
    stays as it is.
    """

    def draw(piece: ShardSlice, out: Tensor) -> None:
        draw_piece(piece, out, seed=seed, num_layers=num_layers, scheme=scheme, std=std, dtype=dtype)

    with ThreadPoolExecutor(threads) as pool:
        drawing = []
        for name, start, flat in owned:
            for piece in held[name]:
                for offset, size, first in boxes(piece, start, start + flat.numel()):
                    out = flat[first - start : first - start + size.numel()].view(size)
                    part = replace(piece, offset=tuple(offset), size=tuple(size))
                    drawing += [pool.submit(draw, band, rows) for band, rows in _bands(part, out)]
        for each in drawing:
            each.result()


def draw_piece(
    piece: ShardSlice,
    out: Tensor,
    *,
    seed: int,
    num_layers: int,
    scheme: Scheme,
    std: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the initial values of `piece`, rounded to `dtype`, into `out`."""
    if len(piece.shape) == 1:
        out.fill_(1.0)
        return
    fan_out, fan_in = piece.shape
    normal = scheme == "normal" or "embed_tokens" in piece.name
    writes_residual = piece.name.endswith(("o_proj.weight", "down_proj.weight"))
    bound = 1 / math.sqrt(fan_in) if scheme == "kaiming_uniform" else math.sqrt(6 / (fan_in + fan_out))
    for band, rows in _bands(piece, out):
        values = _draw(band, seed, normal=normal)
        if normal:
            values *= np.float32(std / math.sqrt(2 * num_layers) if scheme == "normal" and writes_residual else std)
        else:
            values = (values * 2 - 1) * np.float32(bound)
        rows.copy_(torch.from_numpy(values).to(dtype))


def _bands(piece: ShardSlice, out: Tensor) -> Iterator[tuple[ShardSlice, Tensor]]:
    """The piece and `out` in rows of tiles: so much is drawn at once, however large the piece is."""
    if len(piece.shape) == 1:
        yield piece, out
        return
    (top, left), (height, width) = piece.offset, piece.size
    for tile_row in range(top // TILE, -(-(top + height) // TILE)):
        first, last = max(top, tile_row * TILE), min(top + height, (tile_row + 1) * TILE)
        yield replace(piece, offset=(first, left), size=(last - first, width)), out[first - top : last - top]


def _draw(band: ShardSlice, seed: int, *, normal: bool) -> NDArray[np.float32]:
    """Part of a standard normal, or uniform in [0, 1), logical tensor, of one row of tiles."""
    digest = hashlib.sha256(f"{seed}:{band.name}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    (top, left), (height, width) = band.offset, band.size
    values = np.empty((height, width), dtype=np.float32)
    tile, tile_row = np.empty((TILE, TILE), np.float32), top // TILE
    rows = slice(top - tile_row * TILE, top + height - tile_row * TILE)
    for tile_column in range(left // TILE, -(-(left + width) // TILE)):
        # The low counter word belongs to the stream itself; the tile's place goes above it.
        counter = np.array([0, 0, tile_row, tile_column], dtype=np.uint64)
        stream = np.random.Generator(np.random.Philox(key=key, counter=counter))
        (stream.standard_normal if normal else stream.random)(dtype=np.float32, out=tile)
        first, last = max(left, tile_column * TILE), min(left + width, (tile_column + 1) * TILE)
        values[:, first - left : last - left] = tile[rows, first - tile_column * TILE : last - tile_column * TILE]
    return values


def in_memory(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[nn.Parameter]:
    """Give each parameter of `module`, which is on the meta device, zeros on `device` in turn, and yield it.

    What two modules share stays shared. Only as much is in memory as the caller leaves there: ZeRO 3 cuts each
    parameter before it asks for the next.
    """
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((each, name))
    for parameter, places in owners.items():
        made = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device), parameter.requires_grad)
        made.__dict__.update(parameter.__dict__ | made.__dict__)
        for owner, name in places:
            setattr(owner, name, made)
        yield made
