"""Micro-batches of token ids for one data-parallel rank, found from a position in the run and nothing else.

The state of a loader is one integer, the samples consumed; see `sampler` for which window a sample is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from megallama.config.schema import DataConfig
from megallama.data.build import read_info
from megallama.data.indexed import IndexedDataset, Tokens, idx_path, open_indexed
from megallama.data.sampler import Sampler, micro_batch_indices, num_windows
from megallama.data.tokenizer import is_named, load_tokenizer
from megallama.errors import UserError
from megallama.labels import IGNORED

SCANNED_TOKENS = 50_000_000

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class MicroBatch:
    """Ids of one forward pass on one data-parallel rank, int64 on the CPU."""

    tokens: torch.Tensor
    """[micro_batch_size, sequence_length]"""
    labels: torch.Tensor
    """[micro_batch_size, sequence_length]: the token after each, or IGNORED."""


class TokenDataset:
    """The dataset PREFIX.bin, PREFIX.idx, and PREFIX.json if it was built here; UserError if it cannot be read."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.info = read_info(prefix)
        self.indexed: IndexedDataset = open_indexed(prefix)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the index, the tokenizer's fingerprint and the first 2^20 ids."""
        with idx_path(self.prefix).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update((self.info.fingerprint if self.info else "").encode())
        digest.update(self.indexed.tokens[: 1 << 20].tobytes())
        return digest.hexdigest()

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """UserError if the model does not know every id: by PREFIX.json, and by the first SCANNED_TOKENS ids."""
        scanned = self.indexed.tokens[:SCANNED_TOKENS]
        needed = max(int(scanned.max(initial=0)) + 1, self.info.vocab_size if self.info else 0)
        if scanned.min(initial=0) < 0:
            raise UserError(f"{self.prefix}.bin holds the negative id {scanned.min()}; build the dataset again")
        if needed > model_vocab_size:
            raise UserError(
                f"model.vocab_size={model_vocab_size} is less than the {needed} ids of the dataset {self.prefix}; "
                f"set model.vocab_size={needed} or more"
            )

    def check_tokenizer(self, spec: str) -> None:
        """UserError if the dataset is known to be made with another tokenizer than `spec`."""
        if self.info is None or (is_named(spec) and spec == self.info.tokenizer):
            return  # A name always means the same ids, and a compute node may be unable to download it
        if load_tokenizer(spec).fingerprint != self.info.fingerprint:
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

    @property
    def tokens(self) -> Tokens:
        """[num_tokens], mapped, not read."""
        offsets = self.dataset.indexed.offsets
        return self.dataset.indexed.tokens[offsets[self.first_document] : offsets[self.end_document]]


def split_documents(config: DataConfig) -> dict[Split, DocumentSplit]:
    """The train split, and the validation split if the config asks for one.

    Validation is `validation_path`, or the last documents of `path`: validation_fraction of them, rounded, at least
    one. UserError if a split has too few tokens for one sample.
    """
    dataset = TokenDataset(config.path)
    count = dataset.indexed.num_documents
    splits: dict[Split, DocumentSplit] = {"train": DocumentSplit(dataset, 0, count)}
    if config.validation_path is not None:
        other = TokenDataset(config.validation_path)
        splits["validation"] = DocumentSplit(other, 0, other.indexed.num_documents)
    elif config.validation_fraction > 0:
        if count < 2:
            raise UserError(
                f"data.path={config.path} holds {count} document, too few to keep one for validation; "
                "set data.validation_fraction=0 or data.validation_path"
            )
        cut = min(max(count - max(round(count * config.validation_fraction), 1), 1), count - 1)
        splits = {"train": DocumentSplit(dataset, 0, cut), "validation": DocumentSplit(dataset, cut, count)}
    _check_lengths(config, splits)
    return splits


def _check_lengths(config: DataConfig, splits: dict[Split, DocumentSplit]) -> None:
    name, num_tokens = min(((name, len(split.tokens)) for name, split in splits.items()), key=lambda item: item[1])
    if num_tokens <= config.sequence_length:
        fix = f"largest legal: {num_tokens - 1}" if num_tokens > 1 else "none is legal, add documents"
        raise UserError(
            f"data.sequence_length={config.sequence_length} is longer than the data: the {name} split of "
            f"{splits[name].dataset.prefix} has {num_tokens} tokens and a sample takes sequence_length + 1; {fix}"
        )


class Loader:
    """This rank's micro-batches of a split.

    The train split is shuffled anew in every epoch; the validation split keeps the order of the file. Over the ranks,
    a step is the samples [samples_consumed, samples_consumed + global_batch_size) at every dp_size and
    micro_batch_size. UserError if the data cannot be read, is too short, or was not made with data.tokenizer.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
    ) -> None:
        assert global_batch_size % (micro_batch_size * dp_size) == 0, (global_batch_size, micro_batch_size, dp_size)
        splits = split_documents(config)
        if split not in splits:
            raise UserError("there is no validation split; set data.validation_path or data.validation_fraction")
        self.global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._sequence_length = config.sequence_length
        self._split = splits[split]
        self._tokens = self._split.tokens
        self._split.dataset.check_tokenizer(config.tokenizer)
        self._masked_id = _eod_id(self._split.dataset, config.tokenizer) if config.eod_mask_loss else None
        self.samples_per_epoch = num_windows(len(self._tokens), config.sequence_length)
        self._sampler = Sampler(self.samples_per_epoch, seed) if split == "train" else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what a position means besides the seed: the dataset, the split's documents, the sample length."""
        split = self._split
        parts = [split.dataset.fingerprint, split.first_document, split.end_document, self._sequence_length]
        return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """UserError if the dataset holds ids that the model does not know."""
        self._split.dataset.check_vocabulary(model_vocab_size)

    def step(self, samples_consumed: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that starts at sample `samples_consumed` of the run."""
        micro_batches = self.global_batch_size // (self._micro_batch_size * self._dp_size)
        return [self._micro_batch(self._samples(samples_consumed, micro)) for micro in range(micro_batches)]

    def evaluation(self, samples: int) -> Iterator[MicroBatch]:
        """The first `samples` samples of the split, or all if it has fewer, each once over all ranks.

        The last micro-batches are filled up with rows whose labels are all IGNORED, so the sum of losses and the count
        of labels do not depend on the layout, and every rank gets the same number of micro-batches.
        """
        samples = min(samples, self.samples_per_epoch)
        for micro in range(-(-samples // (self._micro_batch_size * self._dp_size))):
            indices = self._samples(0, micro)
            batch = self._micro_batch(indices)
            batch.labels[max(samples - indices.start, 0) :] = IGNORED
            yield batch

    def _samples(self, first_sample: int, micro_batch: int) -> range:
        return micro_batch_indices(first_sample, micro_batch, self._micro_batch_size, self._dp_rank, self._dp_size)

    def _micro_batch(self, samples: Sequence[int]) -> MicroBatch:
        rows = torch.from_numpy(np.stack([self._row(sample) for sample in samples]))
        labels = rows[:, 1:].clone()  # contiguous() would share memory with the tokens in a batch of one
        if self._masked_id is not None:
            labels[labels == self._masked_id] = IGNORED
        return MicroBatch(rows[:, :-1].contiguous(), labels)

    def _row(self, sample: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """[sequence_length + 1]"""
        window = self._sampler.window(sample) if self._sampler else sample % self.samples_per_epoch
        start = window * self._sequence_length
        return self._tokens[start : start + self._sequence_length + 1].astype(np.int64)


def _eod_id(dataset: TokenDataset, tokenizer: str) -> int:
    return dataset.info.eod_id if dataset.info else load_tokenizer(tokenizer).eod_id


def prefetched(loader: Loader, samples_consumed: int) -> Iterator[list[MicroBatch]]:
    """`loader.step` from a position on, without end; each step is read while the one before is computed."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(loader.step, samples_consumed)
        while True:
            batches = upcoming.result()
            samples_consumed += loader.global_batch_size
            upcoming = pool.submit(loader.step, samples_consumed)
            yield batches
