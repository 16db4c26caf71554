"""How the next token is drawn from logits, for each row by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the penalty first, then the temperature, top_k, top_p and min_p, in this order."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw among this many likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    seed: int = 0
    """Fixes the draws."""
    min_p: float | None = None
    """Draw among tokens with at least this part of the likeliest one's probability (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens that are in the text, and multiplies those below (arXiv 1909.05858)."""


class Sampler:
    """The draws of one row: its own random numbers, and the tokens that its text holds.

    So a row's tokens do not depend on what else is in a batch. Sample `number` of a prompt draws by the seed + number.
    """

    def __init__(self, sampling: Sampling, ids: Sequence[int], vocab_size: int, device: torch.device, number: int = 0):
        self.sampling = sampling
        self._randomness = torch.Generator(device).manual_seed((sampling.seed + number) % (MOST_SEED + 1))
        self._held: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._held = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._held[torch.tensor(ids, device=device)] = True

    def pick(self, logits: Tensor) -> Tensor:
        """The next token, a scalar, for finite or -inf logits [vocabulary]; a token of -inf is never drawn."""
        if self._held is not None:
            penalty = self.sampling.repetition_penalty
            logits = torch.where(self._held, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        token = pick(logits, self.sampling, self._randomness)
        if self._held is not None:
            self._held[token] = True
        return token


_COLDEST = 1e-30
"""Temperatures below are 0, as the smallest are in fp32."""


def pick(logits: Tensor, sampling: Sampling, randomness: torch.Generator) -> Tensor:
    """The next token, a scalar, for logits [vocabulary]."""
    if sampling.temperature < _COLDEST:
        return logits.argmax()
    # The likeliest at zero: the division overflows for none that is drawn.
    scaled = (logits - logits.max()) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scaled):
        scaled, order = scaled.topk(sampling.top_k)
    elif sampling.top_p is not None:
        scaled, order = scaled.sort(descending=True)
    else:
        order = None
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_p is not None:
        # A token stays if those before it do not reach top_p yet.
        out = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p
        out[0] = False
        probabilities = probabilities.masked_fill(out, 0.0)
    if sampling.min_p is not None:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=randomness)[0]
    return drawn if order is None else order[drawn]
