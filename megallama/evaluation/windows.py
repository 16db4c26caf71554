"""Texts cut into windows, so that every token is predicted once, with as much before it as the window has room for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megallama.config.schema import IGNORE_INDEX


@dataclass(frozen=True)
class Window:
    """A stretch of tokens of which the last ones count."""

    tokens: tuple[int, ...]
    """What the model reads, and behind it the last token that it predicts."""
    counted: int
    """How many of the last tokens are predicted here and in no other window."""


def windows(ids: Sequence[int], size: int, stride: int) -> Iterator[Window]:
    """All of `ids` but the first, which is only read, in windows of `size` predictions.

    The first window counts all of them; every other moves on by `stride`, counts that many, and reads the `size` -
    `stride` tokens before them again (Hugging Face, "Perplexity of fixed-length models").
    """
    counted = 0
    while counted < len(ids) - 1:
        end = min(len(ids) - 1, counted + (stride if counted else size))
        yield Window(tuple(ids[max(0, end - size) : end + 1]), end - counted)
        counted = end


def stacked(batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """(tokens, labels), each [windows, longest]: filled up at the end, where no token that counts sees it."""
    longest = max(len(window.tokens) - 1 for window in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, window in enumerate(batch):
        ids, length = torch.tensor(window.tokens), len(window.tokens) - 1
        tokens[row, :length] = ids[:-1]
        labels[row, length - window.counted : length] = ids[-window.counted :]
    return tokens, labels
