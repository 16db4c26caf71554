"""A file in numbered blocks of documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

from megallama.corpus.corpora import _read_json_lines, _read_source_code, _read_text

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Reading:
    """How documents are found in text."""

    text_field: str = "text"
    least_characters: int = 1
    on_error: Literal["stop", "skip"] = "stop"


class Block(NamedTuple):
    number: int
    documents: Iterator[str]
    left_out: Counter[str]


def read_blocks(
    path: Path, reading: Reading, share: tuple[int, int] = (0, 1), skip: Container[int] = ()
) -> Iterator[Block]:
    if path.suffix == ".py":
        documents = _read_source_code(path)
    elif path.suffix == ".txt":
        documents = _read_text(path)
    else:
        documents = _read_json_lines(path, reading.text_field)
    at = 0

    def numbered() -> Iterator[tuple[int, str]]:
        nonlocal at
        for document in documents:
            yield at // BLOCK_BYTES, document
            at += len(document.encode()) + 13

    for number, items in groupby(numbered(), lambda item: item[0]):
        left_out = Counter[str]()
        if number % share[1] == share[0] and number not in skip:
            yield Block(number, (text for _, text in items if text), left_out)
