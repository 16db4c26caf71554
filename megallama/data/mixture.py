"""Several datasets as one source: samples by weight, the same whatever reads them; see `blend` for the order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megallama.config.data_keys import DataConfig, MixtureSource
from megallama.config.schema import RunConfig
from megallama.data.blend import Blend, stage_of
from megallama.data.dataset import SCANNED_TOKENS, DocumentSplit, Split, split_documents
from megallama.data.source import LeftOut, Place, Source, Windows, open_source, open_whole, samples_of
from megallama.errors import UserError
from megallama.layout.budget import NOTHING_SEEN, Seen, run_samples, stage_samples
from megallama.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Mixture:
    """The samples of several datasets in the order of a blend."""

    blend: Blend
    parts: Sequence[Windows]
    """In the order of the blend's names."""
    steps: Sequence[int]
    """Steps done when each stage begins."""

    @property
    def samples_per_epoch(self) -> int:
        return min(number for number in self.repeats if number is not None)

    @property
    def repeats(self) -> list[int | None]:
        """By source, the number of its first sample that was read before; None if it never comes."""
        return [self.blend.number(source, part.samples_per_epoch) for source, part in enumerate(self.parts)]

    @property
    def masked_id(self) -> int | None:
        return self.parts[0].masked_id  # one tokenizer, one end of documents

    def sample(self, number: int) -> NDArray[np.int64]:
        source, count = self.blend.locate(number)
        return self.parts[source].sample(count)

    def documents(self, number: int) -> NDArray[np.int32]:
        source, count = self.blend.locate(number)
        return self.parts[source].documents(count)

    @property
    def left_out(self) -> LeftOut:
        return LeftOut(*(sum(counts) for counts in zip(*(part.left_out for part in self.parts), strict=True)))

    def trace(self, number: int) -> tuple[str, Place]:
        """The source of sample `number`, and where it is there."""
        source, count = self.blend.locate(number)
        return self.blend.names[source], self.parts[source].trace(count)

    def epochs(self, samples: int) -> dict[str, tuple[int, float]]:
        """Of each source, how many of the first `samples` samples are its own, and how often those are all it has."""
        found = zip(self.blend.names, self.parts, self.blend.read(samples), strict=True)
        return {name: (read, read / part.samples_per_epoch) for name, part, read in found}

    def fingerprint(self, sequence_length: int, stages: int = 1) -> str:
        return self._hash([part.fingerprint(sequence_length) for part in self.parts], stages)

    @property
    def content_hash(self) -> str:
        return self._hash([part.content_hash for part in self.parts], len(self.steps))

    def _hash(self, parts: Sequence[str], stages: int) -> str:
        """Over so many stages from the first.

        One source alone is what data.path names: such a run goes on with stages that are still to come.
        """
        digest, by_name = hashlib.sha256(b"mixture"), dict(zip(self.blend.names, parts, strict=True))
        begun = self.blend.stages[:stages]
        if len(begun) == 1 and len(begun[0].names) == 1:
            return by_name[begun[0].names[0]]
        for step, stage in zip(self.steps, begun, strict=False):
            for name, share in stage.shares.items():
                digest.update(f"/{step}/{name}/{share}/{by_name[name]}".encode())
        return digest.hexdigest()

    def begun_at(self, firsts: Sequence[int]) -> Mixture:
        """The same with stages that begin at these samples."""
        stages = [stage._replace(first_sample=first) for first, stage in zip(firsts, self.blend.stages, strict=True)]
        return Mixture(Blend(stages), self.parts, self.steps)


@dataclass(frozen=True)
class Opened:
    """The data of a run that reads a mixture."""

    train: Mixture
    validation: Source | None
    held_out: Mapping[str, Windows]
    """What is held out of each source, by its name, where there are several."""


def open_mixture(config: RunConfig, seen: Seen = NOTHING_SEEN) -> Opened:
    """The sources of data.mixture, of a run that is as far as `seen`.

    Where validation is held out of them, it is in the order of the files, by the weights of the first stage. UserError
    as of `open_source`.
    """
    data, splits = config.data, dict[str, dict[Split, DocumentSplit]]()
    begins = zip(stage_samples(config, seen), data.stages, strict=True)
    blend = Blend([stage_of(first, weights(stage.sources)) for first, stage in begins])
    wanted = sources_of(data)
    elsewhere = {"validation_path": None, "validation_fraction": 0.0}
    alone = data if data.validation_path is None else data.model_copy(update=elsewhere)
    tokenizer, scanned = load_tokenizer(data.tokenizer), SCANNED_TOKENS // len(wanted)

    def opened(name: str, split: Split, seed: int | None) -> Windows:
        try:
            if name not in splits:
                splits[name] = split_documents(alone, wanted[name].path)
            found = splits[name][split]
            order = "" if blend.stages[0].names == (name,) else name  # alone at first: in the order of data.path
            return samples_of(found, data, config.model.vocab_size, tokenizer, seed, order, scanned)
        except UserError as error:
            raise UserError(f"data.mixture, source {name}: {error}") from None

    train = Mixture(
        blend,
        [opened(name, "train", config.train.seed) for name in blend.names],
        [stage.from_step for stage in data.stages],
    )
    if data.validation_path is not None:
        return Opened(train, open_whole(data, data.validation_path, config.model.vocab_size), {})
    if data.validation_fraction == 0:
        return Opened(train, None, {})
    held_out = {name: opened(name, "validation", None) for name in wanted}
    first = Blend(blend.stages[:1])
    validation = Mixture(first, [held_out[name] for name in first.names], [0])
    return Opened(train, validation, held_out if len(held_out) > 1 else {})


def open_train(config: RunConfig, seen: Seen = NOTHING_SEEN) -> Mixture:
    """What the run trains on, also a single dataset, under the last part of its path. UserError as of the others."""
    if config.data.mixture is not None:
        return open_mixture(config, seen).train
    assert config.data.path is not None
    name = MixtureSource(path=config.data.path, weight=1).called
    source = open_source(config.data, "train", config.train.seed, config.model.vocab_size)
    return Mixture(Blend([stage_of(0, {name: 1.0})]), [source], [0])


def sources_of(data: DataConfig) -> dict[str, MixtureSource]:
    """The sources of all stages by name, in the order in which they are written, each with its least limit."""
    found: dict[str, MixtureSource] = {}
    for source in (source for stage in data.stages for source in stage.sources):
        limits = [each.epochs for each in (found.get(source.called, source), source) if each.epochs is not None]
        found[source.called] = source.model_copy(update={"epochs": min(limits, default=None)})
    return found


def weights(sources: Sequence[MixtureSource]) -> dict[str, float]:
    """By the name of the source."""
    return {source.called: source.weight for source in sources}


def check_epochs(mixture: Mixture, config: RunConfig, seen: Seen = NOTHING_SEEN) -> None:
    """UserError where a run that is as far as `seen` would read a source for more epochs than it may."""
    samples = run_samples(config, seen)
    read = mixture.epochs(samples)
    for name, source in sources_of(config.data).items():
        (_, epochs), limit = read[name], source.epochs
        if limit is not None and epochs > limit:
            most = limit * mixture.parts[mixture.blend.names.index(name)].samples_per_epoch
            raise UserError(
                f"data.mixture reads {name} for {epochs:.2f} epochs in this run, more than its epochs={limit:g}; use "
                f"{_less(config.data, seen, name, math.floor(most) / samples)}epochs={math.ceil(100 * epochs) / 100:g}"
            )


def _less(data: DataConfig, seen: Seen, name: str, share: float) -> str:
    """`weight=W at most, or `, with which `name` has this share; a number only where the run has yet to choose one."""
    if len(data.stages) > 1 or seen.step:
        return "less weight for it in stages that have not begun, or "
    given = weights(data.stages[0].sources)
    others = sum(given.values()) - given[name]
    if others == 0 or share < 0.001:  # nothing is read in its place, or the share is near to what a period can meet
        return ""
    return f"weight={0.995 * share * others / (1 - share):.3g} at most, or "  # less, as the digits may be rounded up
