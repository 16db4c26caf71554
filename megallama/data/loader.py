"""Micro-batches of token ids for one data-parallel rank, found from a position in the run and nothing else.

The state of a loader is one integer, the samples consumed; see `sampler` for which window a sample is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megallama.config.schema import IGNORE_INDEX, DataConfig, RunConfig
from megallama.data.dataset import Split, TokenDataset, sampled_ids, split_documents
from megallama.data.sampler import Sampler, micro_batch_indices, num_windows
from megallama.data.tokenizer import Tokenizer, load_tokenizer
from megallama.errors import UserError


@dataclass(frozen=True)
class MicroBatch:
    """Ids of one forward pass on one data-parallel rank, int64 on the CPU."""

    tokens: torch.Tensor
    """[micro_batch_size, sequence_length]"""
    labels: torch.Tensor
    """[micro_batch_size, sequence_length]: the token after each, or IGNORE_INDEX."""


class Loader:
    """This rank's micro-batches of a split.

    The train split is shuffled anew in every epoch; the validation split keeps the order of the file. Over the ranks,
    a step is the samples [samples_consumed, samples_consumed + global_batch_size) at every dp_size and
    micro_batch_size. UserError if the data cannot be read, is too short, was not made with data.tokenizer, or holds an
    id that is not below `vocab_size`; ids far into a large dataset are met when their sample is read.
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
        vocab_size: int,
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
        self._vocab_size = vocab_size
        self._split.dataset.check_tokenizer(config.tokenizer)
        self._split.dataset.check_vocabulary(vocab_size)
        self._masked_id = _eod_id(self._split.dataset, config.tokenizer) if config.eod_mask_loss else None
        self.samples_per_epoch = num_windows(len(self._tokens), config.sequence_length)
        self._sampler = Sampler(self.samples_per_epoch, seed) if split == "train" else None

    def fingerprint(self, sequence_length: int) -> str:
        """SHA-256 of what a position means besides the seed: the dataset, the split's documents, the sample length."""
        split = self._split
        parts = [split.dataset.fingerprint, split.first_document, split.end_document, sequence_length]
        return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()

    @property
    def content_hash(self) -> str:
        """SHA-256 of the fingerprint, and of ids from all over the split: whether two files of one name are one."""
        return hashlib.sha256(
            self.fingerprint(self._sequence_length).encode() + sampled_ids(self._tokens).tobytes()
        ).hexdigest()

    def step(self, samples_consumed: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that starts at sample `samples_consumed` of the run."""
        micro_batches = self.global_batch_size // (self._micro_batch_size * self._dp_size)
        return [self._micro_batch(self._samples(samples_consumed, micro)) for micro in range(micro_batches)]

    def evaluation(self, samples: int) -> Iterator[MicroBatch]:
        """The first `samples` samples of the split, or all if it has fewer, each once over all ranks.

        The last micro-batches are filled up with rows whose labels are all IGNORE_INDEX, so the sum of losses and the
        count of labels do not depend on the layout, and every rank gets the same number of micro-batches.
        """
        samples = min(samples, self.samples_per_epoch)
        for micro in range(-(-samples // (self._micro_batch_size * self._dp_size))):
            indices = self._samples(0, micro)
            batch = self._micro_batch(indices)
            batch.labels[max(samples - indices.start, 0) :] = IGNORE_INDEX
            yield batch

    def _samples(self, first_sample: int, micro_batch: int) -> range:
        return micro_batch_indices(first_sample, micro_batch, self._micro_batch_size, self._dp_rank, self._dp_size)

    def _micro_batch(self, samples: Sequence[int]) -> MicroBatch:
        rows = torch.from_numpy(np.stack([self._row(sample) for sample in samples]))
        labels = rows[:, 1:].clone()  # contiguous() would share memory with the tokens in a batch of one
        if self._masked_id is not None:
            labels[labels == self._masked_id] = IGNORE_INDEX
        return MicroBatch(rows[:, :-1].contiguous(), labels)

    def _row(self, sample: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """[sequence_length + 1]"""
        window = self._sampler.window(sample) if self._sampler else sample % self.samples_per_epoch
        start = window * self._sequence_length
        row = self._tokens[start : start + self._sequence_length + 1].astype(np.int64)
        self._split.dataset.check_ids(row, self._vocab_size)
        return row


@dataclass(frozen=True)
class RunData:
    """What a run reads, on one data-parallel rank."""

    train: Loader
    validation: Loader | None
    tokenizer: Tokenizer

    @property
    def contents(self) -> dict[str, str]:
        """SHA-256 of each, by the name that a sentence calls it by: the same on all ranks."""
        return {
            "the training data": self.train.content_hash,
            "the validation data": "none" if self.validation is None else self.validation.content_hash,
            "the tokenizer": self.tokenizer.fingerprint,
        }


def open_data(config: RunConfig, dp_rank: int, dp_size: int) -> RunData:
    """A rank's data of the run. UserError where it cannot be read, or does not suit the model."""
    train = config.train

    def open_split(split: Split) -> Loader:
        sizes, vocabulary = (train.micro_batch_size, train.global_batch_size), config.model.vocab_size
        return Loader(config.data, split, *sizes, dp_rank, dp_size, train.seed, vocabulary)

    held_out = config.data.validation_path is not None or config.data.validation_fraction > 0
    validation = open_split("validation") if held_out else None
    return RunData(open_split("train"), validation, load_tokenizer(config.data.tokenizer))


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
