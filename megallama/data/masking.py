"""Masked language modelling (BERT, arXiv 1810.04805, section 3.1): what the model sees of a sample, and what it is to
predict.

Masks are a pure function of the seed and the sample's number, as the order of samples is: the same at every layout,
batch size and start of a run, other ones in every epoch, and fixed in an evaluation, which begins at sample 0.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megallama.config.schema import IGNORE_INDEX, RunConfig
from megallama.errors import UserError
from megallama.text.tokenizer import Tokenizer

REPLACED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become the mask token, or any token; the rest stays as it is."""


@dataclass(frozen=True)
class Masking:
    """Which tokens of a sample are chosen, and what stands in their places."""

    seed: int
    probability: float
    """With which each token is chosen that does not end a document; one is chosen always."""
    mask_id: int
    """Of the mask token, the first above those of the tokenizer."""
    eod_id: int

    @cached_property
    def _key(self) -> NDArray[np.uint64]:
        digest = hashlib.sha256(f"{self.seed}:masks".encode()).digest()
        return np.frombuffer(digest[:16], dtype=np.uint64)

    def __call__(self, ids: NDArray[np.int64], sample: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What the model sees of `ids`, those of sample number `sample`, and its labels; all [sequence_length].

        Labels are the ids of the chosen places, and IGNORE_INDEX elsewhere: everywhere if all are ends of documents.
        UserError for an id that is not the tokenizer's.
        """
        self.check_ids(ids)
        # The low counter word belongs to the stream itself.
        counter = np.array([0, 0, sample, 0], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
        choice, fate, other = random.random((3, len(ids)))
        choice[ids == self.eod_id] = np.inf
        chosen = np.isfinite(choice) & (choice <= max(self.probability, choice.min()))
        seen = np.where(chosen & (fate < REPLACED), self.mask_id, ids)
        at_random = chosen & (fate >= REPLACED) & (fate < REPLACED + RANDOM)
        seen[at_random] = (other[at_random] * self.mask_id).astype(np.int64)
        return seen, np.where(chosen, ids, IGNORE_INDEX)

    def check_ids(self, ids: NDArray[np.integer[Any]], whose: str = "the data") -> None:
        """UserError if some of these ids are not the tokenizer's: they would be the mask token, or beyond it."""
        if (highest := int(ids.max())) >= self.mask_id:
            raise UserError(
                f"{whose} hold the id {highest}, and data.tokenizer has {self.mask_id} ids, of which the next is the "
                "mask token; set data.tokenizer to the tokenizer of the data, or train.objective=causal"
            )


def masking_of(config: RunConfig, tokenizer: Tokenizer) -> Masking | None:
    """The masks of a run, None for a causal one. UserError if the model has no id left for the mask token."""
    train, mask_id = config.train, tokenizer.vocab_size
    if train.objective == "causal":
        return None
    if config.data.pack == "one":
        raise UserError("train.objective=masked would see what fills up a sample of data.pack=one; use data.pack=all")
    if config.model.vocab_size <= mask_id:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} leaves no id for the mask token of train.objective=masked "
            f"above the {mask_id} of data.tokenizer={config.data.tokenizer}; set model.vocab_size={mask_id + 1} or more"
        )
    return Masking(train.seed, train.mask_probability, mask_id, tokenizer.eod_id)
