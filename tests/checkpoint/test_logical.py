from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from megallama.checkpoint.logical import logical_state
from megallama.checkpoint.tensors import EXP_AVG, EXP_AVG_SQ, moment_name
from megallama.parallel.shards import ShardSlice, boxes
from megallama.train.engine import Fragment

# A fused parameter of 9 rows and 5 columns: 4 rows of "a", 3 of "b" and 2 of padding, columns 5 ... 9 of 10.
HELD = (ShardSlice("a", (8, 10), (4, 5), (4, 5), 0), ShardSlice("b", (6, 10), (0, 5), (3, 5), 4))


@pytest.mark.parametrize("start", range(0, 45, 3))
@pytest.mark.parametrize("length", [1, 4, 5, 7, 13, 30, 45])
def test_boxes_hold_exactly_the_elements_of_a_flat_range(start: int, length: int) -> None:
    stop = min(start + length, 45)
    local = torch.arange(45.0)
    whole = {"a": torch.full((8, 10), -1.0), "b": torch.full((6, 10), -1.0)}
    for piece in HELD:
        found = list(boxes(piece, start, stop))
        assert len(found) <= 3
        for offset, size, flat in found:
            part = tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))
            assert (whole[piece.name][part] == -1).all()
            whole[piece.name][part] = local[flat : flat + size.numel()].view(size)
    expected = torch.full((45,), -1.0)
    expected[start:stop] = local[start:stop]
    assert torch.equal(whole["a"][4:8, 5:], expected[:20].view(4, 5))
    assert torch.equal(whole["b"][:3, 5:], expected[20:35].view(3, 5))
    assert (whole["a"][:4] == -1).all()
    assert (whole["a"][:, :5] == -1).all()


def test_a_vector_is_one_stretch() -> None:
    piece = ShardSlice("norm", (10,), (0,), (10,))
    assert list(boxes(piece, 3, 8)) == [(torch.Size([3]), torch.Size([5]), 3)]


@pytest.mark.parametrize("size", [(7,), (4, 5), (3, 2, 4), (2, 3, 2, 3)])
def test_tensors_of_any_number_of_dimensions_are_cut_into_boxes(size: tuple[int, ...]) -> None:
    shape, offset = tuple(2 * n for n in size), tuple(size)
    row = math.prod(size[1:])
    piece = ShardSlice("w", shape, offset, size, row=1)
    local = torch.arange(float((size[0] + 2) * row))
    for start, stop in combinations(range(len(local) + 1), 2):
        whole, found = torch.full(shape, -1.0), list(boxes(piece, start, stop))
        assert len(found) <= 2 * len(size) - 1
        for place, extent, flat in found:
            whole[tuple(slice(a, a + n) for a, n in zip(place, extent, strict=True))] = local[
                flat : flat + extent.numel()
            ].view(extent)
        expected = torch.full((len(local),), -1.0)
        expected[start:stop] = local[start:stop]
        held = whole[tuple(slice(n, None) for n in size)]
        assert torch.equal(held, expected[row : row + held.numel()].view(size))


def test_loading_writes_through_to_the_optimizer() -> None:
    master, exp_avg, exp_avg_sq = (torch.zeros(20) for _ in range(3))
    state = logical_state([Fragment("w", 0, master, {EXP_AVG: exp_avg, EXP_AVG_SQ: exp_avg_sq})], {"w": HELD[:1]})
    assert set(state) == {"a", moment_name(EXP_AVG, "a"), moment_name(EXP_AVG_SQ, "a")}
    for chunk in state[moment_name(EXP_AVG, "a")].chunks.values():
        chunk.fill_(7.0)
    assert torch.equal(exp_avg, torch.full((20,), 7.0))
    assert not master.any()
