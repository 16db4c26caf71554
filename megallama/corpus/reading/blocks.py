"""A file as numbered blocks of documents, which several readers share without an index.

The blocks depend on the file alone: every reader finds the same ones, takes those of its share, and passes over the
others. What a block is:

    .jsonl, .jsonl.gz, .jsonl.zst   the lines that begin in [number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES) of the
                                    content, decompressed
    .txt                            the paragraphs from the first blank line that begins at number * BLOCK_BYTES or
                                    behind it to the first at (number + 1) * BLOCK_BYTES or behind it
    .parquet                        a row group
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from megallama.errors import UserError
from megallama.system.remote import SourcePath

BLOCK_BYTES = 16 << 20
"""Of content. A constant of the format: datasets that were begun with another are not continued."""


@dataclass(frozen=True)
class Reading:
    """How documents are found in files."""

    text_field: str = "text"
    """Of a JSON object or a row. `a.b` is the field b of the object a, unless there is a field of that very name."""
    least_characters: int = 1
    """Documents with fewer are left out, and counted as "short", or "empty" where they have none."""
    on_error: Literal["stop", "skip"] = "stop"
    """What is no document raises UserError, or is left out and counted by kind."""


class DocumentError(UserError):
    """What is wrong with one document, or with the rest of a file, of a kind that is counted while others are read."""

    def __init__(self, sentence: str, kind: str = "") -> None:
        super().__init__(sentence)
        self.kind = kind


class Block(NamedTuple):
    """Some documents of a file, read as they are asked for, before the next block is."""

    number: int
    """In its file, from 0."""
    documents: Iterator[str]
    left_out: Counter[str]
    """Documents that are left out, by kind; complete when `documents` is at its end."""
    file_bytes: int
    """Of the file, where the block begins: how far the reader is."""


class BlockFile(Protocol):
    """A file of one format, open."""

    def __init__(self, path: SourcePath, reading: Reading) -> None: ...

    def close(self) -> None: ...

    @property
    def file_bytes(self) -> int:
        """How many bytes of the file were read or passed over."""

    def begin(self, number: int) -> bool:
        """Go forward to a block. Returns whether the file has it."""

    def documents(self, left_out: Counter[str]) -> Iterator[str]:
        """The documents of the block that was begun, empty ones too; faults raise UserError or are counted."""


def read_blocks(
    path: SourcePath, reading: Reading, share: tuple[int, int] = (0, 1), skip: Container[int] = ()
) -> Iterator[Block]:
    """The blocks of a file whose number modulo `share[1]` is `share[0]` and that are not in `skip`, in order.

    A block may have no documents. UserError where the file cannot be read, and for the first fault, unless
    `reading` counts it.
    """
    first, step = share
    with closing(_open(path, reading)) as file:
        for number in itertools.count(first, step):
            if number in skip:
                continue
            if not file.begin(number):
                return
            left_out = Counter[str]()
            yield Block(number, _long_enough(file.documents(left_out), reading, left_out), left_out, file.file_bytes)


def _open(path: SourcePath, reading: Reading) -> BlockFile:
    from megallama.corpus.reading.json_lines import JsonLines
    from megallama.corpus.reading.parquet import ParquetRows
    from megallama.corpus.reading.plain_text import PlainText

    formats: dict[str, type[BlockFile]] = {".txt": PlainText, ".py": PlainText, ".parquet": ParquetRows}
    return formats.get(path.suffix, JsonLines)(path, reading)


def _long_enough(documents: Iterator[str], reading: Reading, left_out: Counter[str]) -> Iterator[str]:
    least = max(1, reading.least_characters)
    for document in documents:
        if len(document) >= least:
            yield document
        else:
            left_out["short" if document else "empty"] += 1
