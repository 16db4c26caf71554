"""The samples of a split in the order in which a run consumes them: what a loader reads, whatever is behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megallama.config.schema import IGNORE_INDEX, DataConfig
from megallama.data.dataset import SCANNED_TOKENS, DocumentSplit, Split, check_lengths, sampled_ids, split_documents
from megallama.data.sampler import Sampler, num_windows
from megallama.errors import UserError
from megallama.text.tokenizer import Tokenizer, load_tokenizer


class Place(NamedTuple):
    """Where a sample is in its dataset."""

    epoch: int
    """How often all samples of the split were read before."""
    unit: int
    """The number of the window in the split, or of the document among those that are samples."""
    document: int
    """The number in the dataset of the document that it begins in."""


class Source(Protocol):
    """Samples by their number, the same on every rank and at every batch size."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples until one comes again."""

    @property
    def parts(self) -> Sequence[Windows]:
        """The datasets that it reads."""

    @property
    def masked_id(self) -> int | None:
        """The id whose prediction counts nothing, None for none."""

    def sample(self, number: int) -> NDArray[np.int64]:
        """[sequence_length + 1] ids of sample `number` of the run, IGNORE_INDEX where it has ended.

        UserError for ids that the model does not know.
        """

    def fingerprint(self, sequence_length: int, step: int = 0) -> str:
        """SHA-256 of what a position means besides the seed: the data of `step` steps, in samples of that length."""

    @property
    def content_hash(self) -> str:
        """SHA-256 of the fingerprint, and of ids from all over the split: whether two files of one name are one."""


@dataclass(frozen=True)
class Windows:
    """Windows of one dataset's split, shuffled anew in every epoch; without `sampler` in the order of the file."""

    split: DocumentSplit
    sequence_length: int
    vocab_size: int
    masked_id: int | None
    sampler: Sampler | None

    @property
    def samples_per_epoch(self) -> int:
        return num_windows(len(self.split.tokens), self.sequence_length)

    @property
    def parts(self) -> Sequence[Windows]:
        return (self,)

    def place(self, number: int) -> Place:
        """Where sample `number` is."""
        index, offsets = self._index(number), self.split.dataset.indexed.offsets
        token = offsets[self.split.first_document] + index * self.sequence_length
        document = int(np.searchsorted(offsets, token, side="right")) - 1
        return Place(number // self.samples_per_epoch, index, document)

    def _index(self, number: int) -> int:
        return self.sampler.window(number) if self.sampler else number % self.samples_per_epoch

    def sample(self, number: int) -> NDArray[np.int64]:
        start = self._index(number) * self.sequence_length
        row = self.split.tokens[start : start + self.sequence_length + 1].astype(np.int64)
        self.split.dataset.check_ids(row, self.vocab_size)
        return row

    def fingerprint(self, sequence_length: int, step: int = 0) -> str:
        parts = [self.split.dataset.fingerprint, self.split.first_document, self.split.end_document, sequence_length]
        return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()

    @property
    def content_hash(self) -> str:
        fingerprint = self.fingerprint(self.sequence_length).encode()
        return hashlib.sha256(fingerprint + sampled_ids(self.split.tokens).tobytes()).hexdigest()


@dataclass(frozen=True)
class Documents(Windows):
    """One document per sample, behind the end of another: cut off at the sequence length, or filled up behind."""

    eod_id: int
    documents: range | NDArray[np.int64]
    """The numbers of those that are samples, which are all that hold a token."""

    @property
    def samples_per_epoch(self) -> int:
        return len(self.documents)

    def place(self, number: int) -> Place:
        index = self._index(number)
        return Place(number // self.samples_per_epoch, index, int(self.documents[index]))

    def sample(self, number: int) -> NDArray[np.int64]:
        document = self.split.dataset.indexed.document(int(self.documents[self._index(number)]))[: self.sequence_length]
        self.split.dataset.check_ids(document, self.vocab_size)
        row = np.full(self.sequence_length + 1, IGNORE_INDEX)
        row[0], row[1 : len(document) + 1] = self.eod_id, document
        return row

    def fingerprint(self, sequence_length: int, step: int = 0) -> str:
        empty = self.split.end_document - self.split.first_document - self.samples_per_epoch
        left_out = f"/{empty} empty left out" if empty else ""
        parts = f"{super().fingerprint(sequence_length)}/one document behind {self.eod_id}{left_out}"
        return hashlib.sha256(parts.encode()).hexdigest()


def open_source(config: DataConfig, split: Split, seed: int, vocab_size: int) -> Windows:
    """The samples of a split: train in an order drawn from the seed, validation in that of the file.

    UserError if the data cannot be read, is too short, was not made with data.tokenizer, or holds an id that is not
    below `vocab_size`; ids far into a large dataset are met when their sample is read.
    """
    splits = split_documents(config)
    if split not in splits:
        raise UserError("there is no validation split; set data.validation_path or data.validation_fraction")
    tokenizer = load_tokenizer(config.tokenizer)
    return samples_of(splits[split], config, vocab_size, tokenizer, seed if split == "train" else None)


def open_set(config: DataConfig, name: str, prefix: str, vocab_size: int) -> Windows:
    """The samples of evaluation.sets.NAME, all of a dataset in the order of the file; UserError as of `open_source`."""
    try:
        return open_whole(config, prefix, vocab_size)
    except UserError as error:
        raise UserError(f"evaluation.sets.{name}: {error}") from None


def open_whole(config: DataConfig, prefix: str, vocab_size: int) -> Windows:
    """The samples of all of a dataset, to evaluate, in the order of the file; UserError as of `open_source`."""
    found = DocumentSplit.whole(prefix)
    check_lengths(config, {"validation": found})
    return samples_of(found, config, vocab_size, load_tokenizer(config.tokenizer))


def samples_of(
    found: DocumentSplit,
    config: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer,
    seed: int | None = None,
    name: str = "",
    scanned: int = SCANNED_TOKENS,
) -> Windows:
    """In an order drawn from `seed` and the `name` in a mixture, if the seed is not None; UserError as above.

    The ids of the first `scanned` tokens are looked at.
    """
    found.dataset.check_tokenizer(config.tokenizer, tokenizer)
    found.dataset.check_vocabulary(vocab_size, scanned)
    one, length, info = config.pack == "one", config.sequence_length, found.dataset.info
    documents = found.with_tokens() if one else range(0)
    count = len(documents) if one else num_windows(len(found.tokens), length)
    sampler = None if seed is None else Sampler(count, seed, name)
    eod_id = info.eod_id if info else tokenizer.eod_id
    if one and eod_id >= vocab_size:
        raise UserError(
            f"data.pack=one puts the end of a document, {eod_id}, before each, and model.vocab_size={vocab_size} does "
            f"not cover it; set model.vocab_size={eod_id + 1} or more"
        )
    masked_id = eod_id if config.eod_mask_loss else None
    if one:
        return Documents(found, length, vocab_size, masked_id, sampler, eod_id, documents)
    return Windows(found, length, vocab_size, masked_id, sampler)
