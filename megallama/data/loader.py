"""Micro-batches of token ids for one data-parallel rank, found from a position in the run and nothing else.

The state of a loader is one integer, the samples consumed; see `source` for what a sample is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from megallama.config.keys import NAMED
from megallama.config.schema import IGNORE_INDEX, RunConfig
from megallama.data.dataset import SCANNED_TOKENS, Split
from megallama.data.masking import Masking, masking_of
from megallama.data.mixture import Mixture, check_epochs, open_mixture
from megallama.data.sampler import micro_batch_indices
from megallama.data.source import Source, open_set, open_source
from megallama.layout.budget import NOTHING_SEEN, Seen, batch_at, place
from megallama.layout.topology import Topology, context_slices
from megallama.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class MicroBatch:
    """Ids of one forward pass on one rank, int64 on the CPU."""

    tokens: torch.Tensor
    """[micro_batch_size, sequence_length / cp]: of each sequence the positions of this rank."""
    labels: torch.Tensor
    """[micro_batch_size, sequence_length / cp]: the token after each, or the masked one itself; else IGNORE_INDEX."""
    documents: torch.Tensor | None = None
    """[micro_batch_size, sequence_length], int32: the document of each token, where none may see another; whole."""

    def to(self, device: torch.device) -> MicroBatch:
        """On `device`, which copies while it computes what came before."""

        def copied(ids: torch.Tensor) -> torch.Tensor:
            return (ids.pin_memory() if device.type == "cuda" else ids).to(device, non_blocking=True)

        documents = None if self.documents is None else copied(self.documents)
        return MicroBatch(copied(self.tokens), copied(self.labels), documents)


class Loader:
    """This rank's micro-batches of a source.

    Over the ranks, the step at a position is the samples [position, position + batch_at(position)) at every dp_size and
    micro_batch_size. Evaluations pass over none.
    """

    def __init__(
        self,
        source: Source,
        micro_batch_size: int,
        batch_at: Callable[[int], int],
        dp_rank: int = 0,
        dp_size: int = 1,
        masking: Masking | None = None,
        document_mask: bool = False,
        cp_rank: int = 0,
        cp_size: int = 1,
        passed_over: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.source, self.batch_at, self.passed_over = source, batch_at, passed_over
        self._micro_batch_size = micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._masking, self._document_mask = masking, document_mask
        self._cp_rank, self._cp_size = cp_rank, cp_size

    def fingerprint(self, sequence_length: int, stages: int = 1) -> str:
        """SHA-256 of what a position means besides the seed: the source's, and what is hidden from what."""
        found = self.source.fingerprint(sequence_length, stages)
        if self._masking is not None:
            found = hashlib.sha256(f"{found}/{self._masking.mask_id}/{self._masking.eod_id}".encode()).hexdigest()
        if self._document_mask:
            found = hashlib.sha256(f"{found}/documents apart".encode()).hexdigest()
        return found

    def of(self, source: Source, passed_over: Sequence[tuple[int, int]] = ()) -> Loader:
        """The same rank's loader of another source, of which it passes over these [first, end), in order."""
        rank, hidden = (self._dp_rank, self._dp_size), (self._masking, self._document_mask)
        context = self._cp_rank, self._cp_size
        return Loader(source, self._micro_batch_size, self.batch_at, *rank, *hidden, *context, passed_over)

    def place(self, sample: int) -> int:
        """The number in the source of sample `sample` of the run."""
        return place(sample, self.passed_over)

    def step(self, samples_consumed: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that starts at sample `samples_consumed` of the run."""
        batch, each = self.batch_at(samples_consumed), self._micro_batch_size * self._dp_size
        micro_batches, rest = divmod(batch, each)
        assert rest == 0, (batch, each)
        samples = (self._samples(samples_consumed, micro) for micro in range(micro_batches))
        return [self._micro_batch([self.place(sample) for sample in each]) for each in samples]

    def evaluation(self, samples: int) -> Iterator[MicroBatch]:
        """The first `samples` samples of the split, or all if it has fewer, each once over all ranks.

        The last micro-batches are filled up with rows whose labels are all IGNORE_INDEX, so the sum of losses and the
        count of labels do not depend on the layout, and every rank gets the same number of micro-batches.
        """
        samples = min(samples, self.source.samples_per_epoch)
        for micro in range(-(-samples // (self._micro_batch_size * self._dp_size))):
            indices = self._samples(0, micro)
            batch = self._micro_batch(indices)
            batch.labels[max(samples - indices.start, 0) :] = IGNORE_INDEX
            yield batch

    def _samples(self, first_sample: int, micro_batch: int) -> range:
        return micro_batch_indices(first_sample, micro_batch, self._micro_batch_size, self._dp_rank, self._dp_size)

    def _micro_batch(self, samples: Sequence[int]) -> MicroBatch:
        documents, seen = None, None
        if self._document_mask:
            documents = torch.from_numpy(np.stack([self.source.documents(sample) for sample in samples]))
            seen = documents[:, :-1].contiguous()
        if self._masking is not None:
            hidden = [self._masking(self.source.sample(sample)[:-1], sample) for sample in samples]
            tokens, predicted = (torch.from_numpy(np.stack(each)) for each in zip(*hidden, strict=True))
            return MicroBatch(self._held(tokens), self._held(predicted), seen)
        rows = torch.from_numpy(np.stack([self.source.sample(sample) for sample in samples]))
        labels = rows[:, 1:].clone()  # contiguous() would share memory with the tokens in a batch of one
        if self.source.masked_id is not None:
            labels[labels == self.source.masked_id] = IGNORE_INDEX
        if documents is not None:  # nothing tells the first token of the next one
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORE_INDEX
        tokens = rows[:, :-1].clamp(min=0)  # what is read where nothing is counts nothing
        return MicroBatch(self._held(tokens), self._held(labels), seen)

    def _held(self, ids: torch.Tensor) -> torch.Tensor:
        """Of whole sequences the positions of this rank."""
        if self._cp_size == 1:
            return ids
        return torch.cat([ids[:, part] for part in context_slices(ids.shape[1], self._cp_rank, self._cp_size)], dim=1)


@dataclass(frozen=True)
class RunData:
    """What a run reads, on one data-parallel rank."""

    train: Loader
    validation: Loader | None
    tokenizer: Tokenizer
    sets: Mapping[str, Loader]
    """What else is evaluated by name, in the same order on all ranks: validation/NAME of sources, evaluation.sets."""

    @property
    def evaluated(self) -> dict[str, Loader]:
        """What an evaluation goes through, by the name of the split or set."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, **validation, **self.sets}

    @property
    def contents(self) -> dict[str, str]:
        """SHA-256 of each, by the name that a sentence calls it by: the same on all ranks."""
        return {
            "the training data": self.train.source.content_hash,
            "the validation data": "none" if self.validation is None else self.validation.source.content_hash,
            **{
                f"the data of {'' if '/' in name else NAMED}{name}": data.source.content_hash
                for name, data in self.sets.items()
            },
            "the tokenizer": self.tokenizer.fingerprint,
        }

    def begun_at(self, stages: Sequence[int], passed_over: Sequence[tuple[int, int]] = ()) -> RunData:
        """The same where stages of the mixture begin at these samples, and training passes over others."""
        source = self.train.source
        begun = source.begun_at(stages) if isinstance(source, Mixture) else source
        return replace(self, train=self.train.of(begun, passed_over))


def open_data(config: RunConfig, topology: Topology, rank: int, seen: Seen = NOTHING_SEEN) -> RunData:
    """A rank's data of a run that is as far as `seen`. UserError where they cannot be read, or do not suit it."""
    data, train = config.data, config.train
    tokenizer = load_tokenizer(data.tokenizer)
    masking = masking_of(config, tokenizer)
    data_place = topology.coordinate(rank, "dp"), topology.dp
    context_place = topology.coordinate(rank, "cp"), topology.cp

    def loader(source: Source) -> Loader:
        if masking is not None:  # here, before a run directory is written; what lies further on is met when it is read
            for part in source.parts:
                scanned = part.split.tokens[: SCANNED_TOKENS // len(source.parts)]
                masking.check_ids(scanned, f"the data of {part.split.dataset.prefix}")
        size, batch = train.micro_batch_size, partial(batch_at, config)
        return Loader(source, size, batch, *data_place, masking, data.documents_apart, *context_place)

    # Sorted: the file of another node may name them in another order.
    sets = {
        name: loader(open_set(data, name, prefix, config.model.vocab_size))
        for name, prefix in sorted(config.evaluation.sets.items())
    }
    if data.mixture is not None:
        opened = open_mixture(config, seen)
        check_epochs(opened.train, config, seen)
        held_out = {f"validation/{name}": loader(source) for name, source in opened.held_out.items()}
        validation = None if opened.validation is None else loader(opened.validation)
        return RunData(loader(opened.train), validation, tokenizer, held_out | sets)

    def open_split(split: Split) -> Loader:
        return loader(open_source(data, split, train.seed, config.model.vocab_size))

    validates = data.validation_path is not None or data.validation_fraction > 0
    return RunData(open_split("train"), open_split("validation") if validates else None, tokenizer, sets)


def prefetched(loader: Loader, samples_consumed: int) -> Iterator[list[MicroBatch]]:
    """`loader.step` from a position on, without end; each step is read while the one before is computed."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(loader.step, samples_consumed)
        while True:
            batches = upcoming.result()
            samples_consumed += loader.batch_at(samples_consumed)
            upcoming = pool.submit(loader.step, samples_consumed)
            yield batches
