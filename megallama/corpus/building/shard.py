"""A shard: the tokens of one block of text, in a file that is whole or not there.

    tokens of all documents, one after the other
    4 bytes for each document: its number of tokens, as little-endian int32
    16 bytes for each document: the hash of its text, where duplicates are looked for
    the counts of the block as JSON
    8 bytes: the length of that JSON
    8 bytes: MAGIC

The counts come last, so a shard that a failing machine cut short is told from a whole one by its end and its length.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megallama.system.whole_file import temporary
from megallama.text.surrogates import without_surrogates
from megallama.text.tokenizer import Encoder

MAGIC = b"MLSHARD1"
END = struct.Struct("<Q8s")
HASH_BYTES = 16


@dataclass(frozen=True)
class Counts:
    """What a block was found to hold."""

    documents: int = 0
    tokens: int = 0
    """Ends of documents included."""
    text_bytes: int = 0
    """Of the documents in UTF-8."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Documents that are not there, by kind."""


@dataclass(frozen=True)
class Shard:
    """A shard on the disk."""

    path: Path
    counts: Counts
    token_bytes: int
    """Where the lengths begin."""

    def sizes(self) -> npt.NDArray[np.int32]:
        """Tokens of each document, its end included."""
        return np.fromfile(self.path, "<i4", self.counts.documents, offset=self.token_bytes)

    def hashes(self) -> npt.NDArray[np.uint64]:
        """Of the text of each document, [documents, 2]."""
        offset = self.token_bytes + 4 * self.counts.documents
        return np.fromfile(self.path, "<u8", 2 * self.counts.documents, offset=offset).reshape(-1, 2)


def write_shard(
    path: Path,
    documents: Iterable[str],
    left_out: Counter[str],
    encoder: Encoder,
    dtype: np.dtype[Any],
    *,
    hashed: bool,
) -> Counts:
    """Tokenise the documents into `path`, each with the end of document behind it, holding one at a time in memory.

    `left_out` is read when the documents have been.
    """
    sizes, hashes, text_bytes = array("i"), bytearray(), 0
    end = np.array([encoder.eod_id], dtype).tobytes()
    written = temporary(path)
    try:
        with written.open("xb") as file:
            for document in documents:
                tokens = 1
                for piece in encoder.pieces(document):
                    tokens += len(piece)
                    file.write(piece.astype(dtype, copy=False).data)
                file.write(end)
                sizes.append(tokens)
                if hashed:
                    content = without_surrogates(document).encode()
                    text_bytes += len(content)
                    hashes += hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
                else:
                    text_bytes += len(document) if document.isascii() else _utf8_bytes(document)
            counts = Counts(len(sizes), sum(sizes), text_bytes, dict(left_out))
            head = json.dumps(asdict(counts)).encode()
            file.write(np.array(sizes, "<i4").tobytes() + hashes + head + END.pack(len(head), MAGIC))
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
    return counts


def read_shard(path: Path, dtype: np.dtype[Any], *, hashed: bool) -> Shard | None:
    """The shard at `path`, None if there is none or it is damaged."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            size, magic = END.unpack(_last(file, length, END.size))
            counts = Counts(**json.loads(_last(file, length - END.size, size)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, struct.error):
        return None
    token_bytes = counts.tokens * dtype.itemsize
    per_document = 4 + HASH_BYTES * hashed
    if magic != MAGIC or length != token_bytes + per_document * counts.documents + size + END.size:
        return None
    return Shard(path, counts, token_bytes)


def _last(file: BinaryIO, end: int, size: int) -> bytes:
    """The `size` bytes before `end`, or less where there are less."""
    file.seek(max(0, end - size))
    return file.read(min(size, end))


def _utf8_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return len(without_surrogates(text).encode())
