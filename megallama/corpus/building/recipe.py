"""What a dataset is made of: the files of the sources in order, the tokenizer, and the rules for documents.

Everything that workers, parts on other nodes and repeated commands have to agree on is here, as values. The files are
cut into units: a large file is one, small ones in a row are one together. A unit and the rules have a key, under which
its shards are kept, so what was tokenised once is found again by every build of the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megallama.corpus.reading.blocks import BLOCK_BYTES, Reading
from megallama.corpus.reading.corpora import source_files
from megallama.corpus.reading.lines import refusals_named
from megallama.data.indexed import token_dtype
from megallama.errors import UserError
from megallama.system.remote import RemoteFile, SourcePath, is_url, source_state
from megallama.text.tokenizer import Tokenizer, load_tokenizer

UNIT_BYTES = 4 << 20
"""Files in a row are one unit up to this size."""
SHARE_BYTES = 1 << 20
"""A file is not shared by more workers than it has of these."""
SHARES = 4
"""A file is shared if it is more than one part in so many of what each worker has to do."""

Share = tuple[int, int]
"""(i, n): the blocks whose number leaves i when it is divided by n."""


@dataclass(frozen=True)
class SourceFile:
    """A file, in the state in which it is read."""

    path: str
    bytes: int
    state: str
    """Another one when the content is another: the time of its last change, or what a storage says of it."""

    @property
    def source(self) -> SourcePath:
        """The file, to be opened."""
        return RemoteFile(self.path, self.bytes, self.state) if is_url(self.path) else Path(self.path)


@dataclass(frozen=True)
class Unit:
    """One file, whose blocks have a shard each, or several small ones, which have one shard together."""

    number: int
    key: str
    files: tuple[SourceFile, ...]

    @cached_property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    def shares(self, count: int, total: int) -> int:
        """Among how many of `count` equal hands it is divided, of `total` bytes that they have to do."""
        if len(self.files) > 1 or self.bytes * SHARES * count <= total:
            return 1
        return min(count, 1 + self.bytes // SHARE_BYTES)


@dataclass(frozen=True)
class Source:
    """A source as it was named, and its files in order."""

    name: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class Recipe:
    """All that determines the bytes of a dataset."""

    tokenizer: str
    """As it was named."""
    fingerprint: str
    vocab_size: int
    eod_id: int
    reading: Reading
    deduplicate: bool
    sources: tuple[Source, ...]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of the tokens."""
        return token_dtype(self.vocab_size)

    @cached_property
    def inputs(self) -> str:
        """Hash over everything that determines the dataset."""
        return _hash([self._rules, self.reading.on_error, [asdict(source) for source in self.sources]])

    @cached_property
    def _rules(self) -> list[Any]:
        """What the shards of a file depend on. Not on `on_error`: a block without errors is the same under both."""
        reading = [self.reading.text_field, self.reading.least_characters]
        return [self.fingerprint, self.deduplicate, reading, BLOCK_BYTES, UNIT_BYTES]

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All files, in order."""
        groups: list[list[SourceFile]] = []
        size = 0
        for file in (file for source in self.sources for file in source.files):
            if not groups or size + file.bytes > UNIT_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(file)
            size += file.bytes
        keys = (_hash([self._rules, [asdict(file) for file in group]])[:20] for group in groups)
        return tuple(Unit(i, key, tuple(group)) for i, (key, group) in enumerate(zip(keys, groups, strict=True)))

    def shares(self, unit: Unit, parts: int) -> tuple[int, ...]:
        """The parts, of `parts`, that read a unit: one alone, or share k of as many as there are reads part k."""
        count = unit.shares(parts, self._bytes)
        return tuple(range(count)) if count > 1 else (unit.number % parts,)

    def work(self, part: Share) -> Iterator[tuple[Unit, Share]]:
        """The units of a part, and which of their blocks; a unit with the key of an earlier one is left out."""
        number, count = part
        seen: set[str] = set()
        for unit in self.units:
            readers = self.shares(unit, count)
            if number in readers and unit.key not in seen:
                yield unit, (readers.index(number), len(readers))
            seen.add(unit.key)

    @cached_property
    def _bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)

    def check_unchanged(self) -> None:
        """UserError if a file of a source is not the one any more that it was."""
        for source in self.sources:
            if changed := next((a for a, b in zip(source.files, _files(source.name), strict=False) if a != b), None):
                raise UserError(f"{changed.path} was changed while it was read; repeat the command")

    def rules(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "text_field": self.reading.text_field,
            "min_length": self.reading.least_characters,
            "on_error": self.reading.on_error,
            "deduplicate": self.deduplicate,
        }


def make_recipe(
    sources: Sequence[str], tokenizer: str, reading: Reading, *, deduplicate: bool
) -> tuple[Recipe, Tokenizer]:
    """Of the state that the sources have now; and the tokenizer. UserError if one of them cannot be read."""
    loaded = load_tokenizer(tokenizer)
    found = tuple(Source(name, _files(name)) for name in sources)
    rules = (tokenizer, loaded.fingerprint, loaded.vocab_size, loaded.eod_id)
    return Recipe(*rules, reading=reading, deduplicate=deduplicate, sources=found), loaded


def recipe_from_json(content: Mapping[str, Any]) -> Recipe:
    """What `asdict` made of a recipe; ValueError, KeyError or TypeError if it is none."""
    sources = tuple(
        Source(source["name"], tuple(SourceFile(**file) for file in source["files"])) for source in content["sources"]
    )
    return Recipe(**{**content, "reading": Reading(**content["reading"]), "sources": sources})


def _files(source: str) -> tuple[SourceFile, ...]:
    with refusals_named(source):
        files = source_files(source)
    return tuple(map(_source_file, files))


def _source_file(path: SourcePath) -> SourceFile:
    with refusals_named(path):
        return SourceFile(str(path), *source_state(path))


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
