"""A dataset that a run reads: does it suit the run, and which of its documents are for training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megallama.config.data_keys import DataConfig
from megallama.data.indexed import Tokens, idx_path
from megallama.data.info import open_described
from megallama.data.offsets import Offsets
from megallama.errors import UserError
from megallama.text.tokenizer import Tokenizer

SCANNED_TOKENS = 50_000_000
SAMPLED_STRETCHES, SAMPLED_TOKENS = 64, 1024

Split = Literal["train", "validation"]


class TokenDataset:
    """The dataset PREFIX.bin, PREFIX.idx, and PREFIX.json if it was built here; UserError if it cannot be read."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.indexed, self.info = open_described(prefix)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the index, the tokenizer's fingerprint and the first 2^20 ids."""
        with idx_path(self.indexed.prefix).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update((self.info.fingerprint if self.info else "").encode())
        digest.update(self.indexed.tokens[: 1 << 20].tobytes())
        return digest.hexdigest()

    def check_vocabulary(self, vocab_size: int, scanned: int = SCANNED_TOKENS) -> None:
        """UserError if a model of `vocab_size` ids does not know all: by PREFIX.json and the first `scanned` tokens."""
        if self.info and self.info.vocab_size > vocab_size:
            raise UserError(
                f"model.vocab_size={vocab_size} is less than the {self.info.vocab_size} ids of the dataset "
                f"{self.prefix}; set model.vocab_size={self.info.vocab_size} or more"
            )
        self.check_ids(self.indexed.tokens[:scanned], vocab_size)

    def check_ids(self, ids: Tokens, vocab_size: int) -> None:
        """UserError if some of these ids of the dataset are unknown to a model of `vocab_size` ids."""
        lowest, highest = int(ids.min(initial=0)), int(ids.max(initial=0))
        if lowest < 0:
            raise UserError(f"{self.prefix}.bin holds the negative id {lowest}; build the dataset again")
        if highest >= vocab_size:
            raise UserError(
                f"model.vocab_size={vocab_size} does not cover the id {highest} of the dataset {self.prefix}; "
                f"set model.vocab_size={highest + 1} or more"
            )

    def check_tokenizer(self, spec: str, tokenizer: Tokenizer) -> None:
        """UserError if the dataset is known to be made with another tokenizer than that of `spec`."""
        if self.info and tokenizer.fingerprint != self.info.fingerprint:
            raise UserError(
                f"data.tokenizer={spec} is not the tokenizer of the dataset {self.prefix}; "
                f"set data.tokenizer={self.info.tokenizer} or build the dataset again"
            )


@dataclass(frozen=True)
class DocumentSplit:
    """A stretch of whole documents of a dataset, as one stream of tokens."""

    dataset: TokenDataset
    first_document: int
    end_document: int

    @classmethod
    def whole(cls, prefix: str) -> DocumentSplit:
        """All documents of the dataset; UserError if it cannot be read."""
        dataset = TokenDataset(prefix)
        return cls(dataset, 0, dataset.indexed.num_documents)

    @property
    def offsets(self) -> Offsets:
        """[documents + 1]: where each begins among the tokens of the dataset, and where the last ends."""
        return self.dataset.indexed.offsets[self.first_document : self.end_document + 1]

    @property
    def tokens(self) -> Tokens:
        """[num_tokens], mapped, not read."""
        return self.dataset.indexed.tokens[self.offsets[0] : self.offsets[-1]]

    def with_tokens(self) -> range | NDArray[np.int64]:
        """Numbers of the documents that hold a token, which those of a dataset made elsewhere may not all do."""
        held = np.concatenate([chunk > 0 for chunk in self.offsets.lengths()])
        return (
            range(self.first_document, self.end_document) if held.all() else self.first_document + np.flatnonzero(held)
        )


def split_documents(config: DataConfig, path: str | None = None) -> dict[Split, DocumentSplit]:
    """The train split of `path`, by default data.path, and the validation split if the config asks for one.

    Validation is `validation_path`, or the last documents of `path`: validation_fraction of them, rounded, at least
    one. UserError if a split has too few tokens for one sample.
    """
    path = path or config.path
    assert path is not None
    whole = DocumentSplit.whole(path)
    dataset, count = whole.dataset, whole.end_document
    splits: dict[Split, DocumentSplit] = {"train": whole}
    if config.validation_path is not None:
        splits["validation"] = DocumentSplit.whole(config.validation_path)
    elif config.validation_fraction > 0:
        if count < 2:
            raise UserError(
                f"{'data.path=' if config.path else ''}{path} holds {count} document, too few to keep one for "
                "validation; set data.validation_fraction=0 or data.validation_path"
            )
        cut = min(max(count - max(round(count * config.validation_fraction), 1), 1), count - 1)
        splits = {"train": DocumentSplit(dataset, 0, cut), "validation": DocumentSplit(dataset, cut, count)}
    check_lengths(config, splits)
    return splits


def sampled_ids(tokens: Tokens) -> Tokens:
    """SAMPLED_STRETCHES stretches of SAMPLED_TOKENS ids, evenly from the first to the last; all where there are fewer.

    What the fingerprint of a large dataset does not read is in them: copies of it that differ hardly agree here.
    """
    if len(tokens) <= SAMPLED_STRETCHES * SAMPLED_TOKENS:
        return np.asarray(tokens)
    starts = np.linspace(0, len(tokens) - SAMPLED_TOKENS, SAMPLED_STRETCHES, dtype=np.int64)
    return np.concatenate([tokens[start : start + SAMPLED_TOKENS] for start in starts])


def check_lengths(config: DataConfig, splits: Mapping[Split, DocumentSplit]) -> None:
    """UserError if a split has too few tokens for one sample."""
    name, num_tokens = min(((name, len(split.tokens)) for name, split in splits.items()), key=lambda item: item[1])
    if num_tokens <= config.sequence_length and config.pack == "all":
        fix = f"largest legal: {num_tokens - 1}" if num_tokens > 1 else "none is legal, add documents"
        tail = name == "validation" and config.validation_path is None
        longer = "set data.validation_path or a larger data.validation_fraction, or a shorter length, " if tail else ""
        raise UserError(
            f"data.sequence_length={config.sequence_length} is longer than the data: the {name} split of "
            f"{splits[name].dataset.prefix} has {num_tokens} tokens and a sample takes sequence_length + 1; "
            f"{longer}{fix}"
        )
    if num_tokens == 0:
        raise UserError(
            f"the {name} split of {splits[name].dataset.prefix} has no tokens; add documents that have some"
        )
