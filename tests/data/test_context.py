"""Ranks that share a sequence: each reads its slices of it, and all together read it once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megallama.config.data_keys import DataConfig
from megallama.data.loader import Loader
from megallama.data.source import open_source
from megallama.layout.topology import context_slices

LENGTH = 24


@pytest.fixture
def loader(write_dataset: Callable[..., str]) -> Callable[..., Loader]:
    """Of samples that count upwards, on a copy and a rank of it."""
    path = write_dataset("d", [list(range(100 * i, 100 * i + 97)) for i in range(10)])
    source = open_source(DataConfig(path=path, sequence_length=LENGTH, validation_fraction=0), "train", 1, 1000)

    def of(dp_rank: int = 0, cp_rank: int = 0, cp_size: int = 1) -> Loader:
        return Loader(source, 2, lambda _: 8, dp_rank, 2, cp_rank=cp_rank, cp_size=cp_size)

    return of


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tokens_and_labels_of_a_rank_are_those_of_its_positions(loader: Callable[..., Loader], size: int) -> None:
    (whole, *_), ranks = loader(1).step(0), [loader(1, rank, size).step(0)[0] for rank in range(size)]
    for name in ("tokens", "labels"):
        found, expected = torch.full((2, LENGTH), -1), getattr(whole, name)
        for rank, batch in enumerate(ranks):
            parts = getattr(batch, name).split(LENGTH // (2 * size), dim=1)
            for part, where in zip(parts, context_slices(LENGTH, rank, size), strict=True):
                found[:, where] = part
        assert torch.equal(found, expected)


def test_the_loader_of_another_source_is_at_the_same_place(loader: Callable[..., Loader]) -> None:
    for place in ((0, 0, 2), (1, 1, 2)):
        here = loader(*place)
        (found, *_), (expected, *_) = here.of(here.source).step(8), here.step(8)
        assert torch.equal(found.tokens, expected.tokens)
    assert not torch.equal(loader(1, 1, 2).step(8)[0].tokens, loader(0, 0, 2).step(8)[0].tokens)
