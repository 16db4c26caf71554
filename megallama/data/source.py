"""The samples of a split in the order in which a run consumes them: what a loader reads, whatever is behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megallama.config.data_keys import DataConfig
from megallama.config.schema import IGNORE_INDEX
from megallama.data.dataset import SCANNED_TOKENS, DocumentSplit, Split, check_lengths, sampled_ids, split_documents
from megallama.data.indexed import Tokens
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


class LeftOut(NamedTuple):
    """What no sample of an epoch holds or predicts."""

    tokens: int
    documents: int
    """Of which there are such tokens."""
    empty: int
    """Documents without a token, where each other one is a sample."""


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

    def documents(self, number: int) -> NDArray[np.int32]:
        """[sequence_length + 1]: which document each id of sample `number` is of, counted from 0 within the sample.

        By the index, not by ids, which end documents in some data alone. What fills up a sample is one more.
        """

    def fingerprint(self, sequence_length: int, stages: int = 1) -> str:
        """SHA-256 of what a position means besides the seed: the data of the first `stages` stages of a mixture, in
        samples of that length.
        """

    @property
    def left_out(self) -> LeftOut:
        """What an epoch passes over, counted in the index."""

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

    def place(self, number: int) -> int:
        """Which of the samples of an epoch sample `number` is, in the order of the file."""
        return self.sampler.window(number) if self.sampler else number % self.samples_per_epoch

    def trace(self, number: int) -> Place:
        """Where sample `number` is."""
        unit, offsets = self.place(number), self.split.dataset.indexed.offsets
        token = self.split.offsets[0] + unit * self.sequence_length
        document = int(offsets.searchsorted(token, side="right")) - 1
        return Place(number // self.samples_per_epoch, unit, document)

    def sample(self, number: int) -> NDArray[np.int64]:
        start = self.place(number) * self.sequence_length
        row = self.split.tokens[start : start + self.sequence_length + 1].astype(np.int64)
        self.split.dataset.check_ids(row, self.vocab_size)
        return row

    def documents(self, number: int) -> NDArray[np.int32]:
        offsets = self.split.offsets
        start = offsets[0] + self.place(number) * self.sequence_length
        end = start + self.sequence_length + 1
        first, last = offsets.searchsorted([start, end - 1], side="right")
        lengths = np.diff(np.concatenate([[start], offsets[first:last], [end]]))
        lengths = lengths[lengths > 0]  # some documents made elsewhere are empty
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)

    @property
    def left_out(self) -> LeftOut:
        """Behind the last window."""
        offsets = self.split.offsets
        end = offsets[0] + self.samples_per_epoch * self.sequence_length + 1
        cut = len(offsets) - offsets.searchsorted(end, side="right")
        return LeftOut(int(offsets[-1] - end), int(cut), 0)

    def fingerprint(self, sequence_length: int, stages: int = 1) -> str:
        parts = [self.split.dataset.fingerprint, self.split.first_document, self.split.end_document, sequence_length]
        return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()

    @property
    def content_hash(self) -> str:
        fingerprint = self.fingerprint(self.sequence_length).encode()
        return hashlib.sha256(fingerprint + sampled_ids(self.split.tokens).tobytes()).hexdigest()


@dataclass(frozen=True)
class Documents(Windows):
    """One document per sample, behind the end of another: cut off at the sequence length, or filled up.

    The last tokens of a longer one are behind those that they follow.
    """

    eod_id: int
    numbers: range | NDArray[np.int64]
    """Of the documents that are samples, which are all that hold a token."""
    truncate: Literal["first", "last"]
    pad: Literal["right", "left"]

    @property
    def samples_per_epoch(self) -> int:
        return len(self.numbers)

    def trace(self, number: int) -> Place:
        unit = self.place(number)
        return Place(number // self.samples_per_epoch, unit, int(self.numbers[unit]))

    def sample(self, number: int) -> NDArray[np.int64]:
        document, length = self._document(number), self.sequence_length
        if self.truncate == "last" and len(document) > length:
            seen = document[-length - 1 :].astype(np.int64)  # behind what is before it
        else:
            seen = np.concatenate([[self.eod_id], document[:length]])
        self.split.dataset.check_ids(seen[1:], self.vocab_size)
        padding = (0, length + 1 - len(seen)) if self.pad == "right" else (length + 1 - len(seen), 0)
        return np.pad(seen, padding, constant_values=IGNORE_INDEX)

    def documents(self, number: int) -> NDArray[np.int32]:
        padded = np.zeros(self.sequence_length + 1, np.int32)
        held = 1 + min(len(self._document(number)), self.sequence_length)
        padded[slice(held, None) if self.pad == "right" else slice(-held)] = 1
        return padded

    def _document(self, number: int) -> Tokens:
        return self.split.dataset.indexed.document(int(self.numbers[self.place(number)]))

    @property
    def left_out(self) -> LeftOut:
        """What documents have beyond the length of a sample."""
        offsets, length = self.split.offsets, self.sequence_length
        beyond = np.concatenate([sizes[sizes > length] - length for sizes in offsets.lengths()])
        return LeftOut(int(beyond.sum()), len(beyond), len(offsets) - 1 - self.samples_per_epoch)

    def fingerprint(self, sequence_length: int, stages: int = 1) -> str:
        empty = self.split.end_document - self.split.first_document - self.samples_per_epoch
        left_out = f"/{empty} empty left out" if empty else ""
        kept = "/its last tokens" if self.truncate == "last" else ""
        padded = "/filled up before it" if self.pad == "left" else ""
        parts = f"{super().fingerprint(sequence_length)}/one document behind {self.eod_id}{left_out}{kept}{padded}"
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
    numbers = found.with_tokens() if one else range(0)
    count = len(numbers) if one else num_windows(len(found.tokens), length)
    sampler = None if seed is None else Sampler(count, seed, name)
    eod_id = info.eod_id if info else tokenizer.eod_id
    if one and eod_id >= vocab_size:
        raise UserError(
            f"data.pack=one puts the end of a document, {eod_id}, before each, and model.vocab_size={vocab_size} does "
            f"not cover it; set model.vocab_size={eod_id + 1} or more"
        )
    masked_id = eod_id if config.eod_mask_loss else None
    if one:
        how = config.truncate, config.pad
        return Documents(found, length, vocab_size, masked_id, sampler, eod_id, numbers, *how)
    return Windows(found, length, vocab_size, masked_id, sampler)
