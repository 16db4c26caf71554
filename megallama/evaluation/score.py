"""Loss, perplexity and bits per byte of a model on given text."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from megallama.errors import UserError
from megallama.evaluation.texts import Text
from megallama.evaluation.windows import Window, stacked, windows
from megallama.generation.load import Loaded

LONGEST_WINDOW = 8192
"""Tokens of a window where none is asked for and the model takes more."""


@dataclass(frozen=True)
class Settings:
    """How text is cut and counted."""

    window: int
    stride: int
    packed: bool
    batch_size: int


@dataclass
class Score:
    """What has been counted."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def as_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
        }


def settings_for(loaded: Loaded, window: int | None, stride: int | None, packed: bool, batch_size: int) -> Settings:
    """What was asked for, and what was left open: a window as long as the model takes, half of it for the stride.

    UserError for a window beyond the model's, or a stride beyond the window.
    """
    most = loaded.config.max_position_embeddings
    size = min(most, LONGEST_WINDOW) if window is None else window
    if size > most:
        raise UserError(f"--window {size} is beyond the {most} positions of the model; use at most {most}")
    step = max(1, size // 2) if stride is None else stride
    if step > size:
        raise UserError(f"--stride {step} would leave tokens out between windows of {size}; use at most {size}")
    return Settings(size, step, packed, batch_size)


def score(loaded: Loaded, texts: Iterable[Text], settings: Settings, told: Callable[[Score], None]) -> Score:
    """The score of `texts`, alone or packed; `told` hears of it after each batch.

    UserError where the loss is not finite.
    """
    found = Score()
    cut = _windows(loaded, texts, settings, found)
    while batch := list(islice(cut, settings.batch_size)):
        tokens, labels = (each.to(loaded.device) for each in stacked(batch))
        with torch.inference_mode():
            nats = float(loaded.model(tokens, labels))
        if not math.isfinite(nats):
            raise UserError(f"the model of {loaded.source} gives a loss that is not finite; use another checkpoint")
        found.nats += nats
        found.tokens += sum(window.counted for window in batch)
        told(found)
    return found


def _windows(loaded: Loaded, texts: Iterable[Text], settings: Settings, found: Score) -> Iterator[Window]:
    """Of every text alone, or of all packed as for training: each is ended, and its end is predicted as well."""
    packed = array("q", [loaded.tokenizer.eod_id])
    for text in texts:
        found.documents += 1
        found.bytes += text.bytes
        if settings.packed:
            packed.extend([*text.ids, loaded.tokenizer.eod_id])
        else:
            yield from windows([*beginning(loaded), *text.ids], settings.window, settings.stride)
    yield from windows(packed, settings.window, settings.stride)


def beginning(loaded: Loaded) -> Sequence[int]:
    """What a text stands behind: the last id of what its tokenizer begins with, else the end of another document."""
    return loaded.prefix[-1:] or [loaded.tokenizer.eod_id]
