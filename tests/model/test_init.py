from __future__ import annotations

import math
import time

import pytest
import torch

from megallama.model.init import Scheme, draw_piece
from megallama.parallel.shards import ShardSlice

NAME = "model.layers.3.self_attn.q_proj.weight"


def draw(
    shape: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    size: tuple[int, int] | None = None,
    *,
    name: str = NAME,
    seed: int = 1,
    scheme: Scheme = "normal",
) -> torch.Tensor:
    piece = ShardSlice(name, shape, offset, size or shape)
    out = torch.empty(piece.size)
    draw_piece(piece, out, seed=seed, num_layers=8, scheme=scheme, std=0.02)
    return out


@pytest.mark.parametrize("scheme", ["normal", "kaiming_uniform", "xavier_uniform"])
@pytest.mark.parametrize(
    ("offset", "size"), [((0, 0), (300, 70)), ((100, 0), (200, 140)), ((0, 127), (300, 2)), ((255, 128), (1, 12))]
)
def test_a_shard_is_the_same_part_of_the_whole(offset: tuple[int, int], size: tuple[int, int], scheme: Scheme) -> None:
    whole = draw((300, 140), scheme=scheme)
    part = draw((300, 140), offset, size, scheme=scheme)
    assert torch.equal(part, whole[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]])


def test_names_and_seeds_draw_different_numbers() -> None:
    base = draw((64, 64))
    for other in (draw((64, 64), seed=2), draw((64, 64), name=NAME.replace("3", "4"))):
        assert not torch.isclose(base, other).any()


def test_tiles_are_independent() -> None:
    whole = draw((1024, 1024)) / 0.02
    tiles = whole.unfold(0, 128, 128).unfold(1, 128, 128).flatten(2).flatten(0, 1)
    correlation = torch.corrcoef(tiles) - torch.eye(len(tiles))
    assert correlation.abs().max() < 6 / math.sqrt(128 * 128)


@pytest.mark.parametrize(
    ("name", "scheme", "std"),
    [
        (NAME, "normal", 0.02),
        ("model.layers.3.self_attn.o_proj.weight", "normal", 0.02 / 4),
        ("model.layers.3.mlp.down_proj.weight", "normal", 0.02 / 4),
        (NAME, "kaiming_uniform", 1 / math.sqrt(3 * 512)),
        (NAME, "xavier_uniform", math.sqrt(2 / (1024 + 512))),
        ("model.embed_tokens.weight", "xavier_uniform", 0.02),
    ],
)
def test_standard_deviation_is_that_of_the_scheme(name: str, scheme: Scheme, std: float) -> None:
    weight = draw((1024, 512), name=name, scheme=scheme)
    assert abs(float(weight.mean())) < 0.01 * std
    assert float(weight.std()) == pytest.approx(std, rel=0.01)


def test_norm_weights_are_one() -> None:
    out = torch.empty(64)
    draw_piece(
        ShardSlice("model.norm.weight", (64,), (0,), (64,)), out, seed=1, num_layers=8, scheme="normal", std=0.02
    )
    assert torch.equal(out, torch.ones(64))


def test_a_shard_costs_in_proportion_to_the_shard() -> None:
    """Of several rounds the fastest counts: other programs only add."""

    def seconds(*shard: tuple[int, int]) -> float:
        began = time.process_time()
        draw((8192, 512), *shard)
        return time.process_time() - began

    whole, part = (min(seconds(*shard) for _ in range(5)) for shard in ((), ((4096, 0), (512, 512))))
    assert part < whole / 4
