"""Megatron-LM's indexed dataset: PREFIX.bin with the token ids, PREFIX.idx with the documents.

PREFIX.bin is the ids of all documents, one after the other, in one little-endian integer type. PREFIX.idx is

    offset  bytes  content
    0       9      b"MMIDIDX\\x00\\x00"
    9       8      uint64  version, 1
    17      1      uint8   type of the ids: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    18      8      uint64  S, number of sequences
    26      8      uint64  D + 1, number of documents and one
    34      4 S    int32   tokens in each sequence
    ...     8 S    int64   offset in bytes of each sequence in PREFIX.bin
    ...     8 D+8  int64   first sequence of each document, and S
    ...     S      int8    modes, in multimodal datasets only; not read

all little-endian. Datasets made here have one sequence per document; those made elsewhere may have more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megallama.errors import UserError
from megallama.system.whole_file import temporary

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, str] = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}

AT_ONCE = 1 << 20
"""Documents whose place in the index is computed at once."""

Tokens = npt.NDArray[np.integer[Any]]


def bin_path(prefix: str) -> Path:
    """Where the ids of the dataset `prefix` are."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str) -> Path:
    """Where the index of the dataset `prefix` is."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that Megatron-LM picks for a vocabulary (`DType.optimal_dtype`)."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedWriter:
    """Writes a dataset under temporary names of its own; `close` makes it appear, the index last.

    The memory it takes does not depend on the number of documents.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any]) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._documents = 0
        bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin_path, self._idx_path = temporary(bin_path(prefix)), temporary(idx_path(prefix))
        self._bin = self._bin_path.open("xb")
        self._idx = self._idx_path.open("x+b")
        self._idx.seek(HEADER.size)

    def add(self, tokens: Tokens, sizes: npt.NDArray[np.int32]) -> None:
        """Append whole documents: their ids one after the other, and the length of each."""
        assert tokens.dtype == self._dtype, tokens.dtype
        assert len(tokens) == sizes.sum(), (len(tokens), sizes.sum())
        self._bin.write(np.ascontiguousarray(tokens).data)
        self._add_sizes(sizes)

    def copy(self, source: BinaryIO, stretches: Iterable[tuple[int, int]], sizes: npt.NDArray[np.int32]) -> None:
        """Append whole documents whose ids are the bytes [begin, end) of `source`, for each such pair in turn."""
        self._bin.flush()
        for begin, end in stretches:
            _copy(source, begin, end, self._bin)
        self._add_sizes(sizes)

    def _add_sizes(self, sizes: npt.NDArray[np.int32]) -> None:
        self._idx.write(sizes.astype("<i4", copy=False).tobytes())
        self._documents += len(sizes)

    def seal(self) -> None:
        """Bring both files to the disk, under their temporary names."""
        finish_index(self._idx, self._documents, self._dtype)
        for file in (self._idx, self._bin):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def close(self) -> None:
        """Put both files in place; a dataset that stood there is gone before the first changes."""
        if not self._bin.closed:
            self.seal()
        idx_path(self._prefix).unlink(missing_ok=True)
        self._bin_path.replace(bin_path(self._prefix))
        self._idx_path.replace(idx_path(self._prefix))

    def discard(self) -> None:
        """Remove what was written under temporary names."""
        for file, path in ((self._bin, self._bin_path), (self._idx, self._idx_path)):
            with contextlib.suppress(OSError):  # a full disk refuses the rest of the buffer again
                file.close()
            path.unlink(missing_ok=True)


def finish_index(file: BinaryIO, count: int, dtype: np.dtype[Any]) -> None:
    """Complete an .idx file in which the lengths of its `count` documents stand, behind the place of the header."""
    code = next(code for code, name in DTYPE_CODES.items() if np.dtype(name) == dtype)
    end = 0
    for first in range(0, count, AT_ONCE):
        file.seek(HEADER.size + 4 * first)
        sizes = np.frombuffer(file.read(4 * min(AT_ONCE, count - first)), "<i4").astype("<i8") * dtype.itemsize
        file.seek(HEADER.size + 4 * count + 8 * first)
        file.write((np.cumsum(sizes) - sizes + end).tobytes())
        end += int(sizes.sum())
    file.seek(HEADER.size + 12 * count)
    for first in range(0, count + 1, AT_ONCE):
        file.write(np.arange(first, min(first + AT_ONCE, count + 1), dtype="<i8").tobytes())
    file.seek(0)
    file.write(HEADER.pack(MAGIC, 1, code, count, count + 1))


def _copy(source: BinaryIO, begin: int, end: int, target: BinaryIO) -> None:
    """Append bytes of a file to another, in the kernel where that can; some file systems share them so."""
    try:
        while begin < end and (copied := os.copy_file_range(source.fileno(), target.fileno(), end - begin, begin)):
            begin += copied
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
    source.seek(begin)
    while begin < end:
        chunk = source.read(min(end - begin, 8 * AT_ONCE))
        if not chunk:
            raise OSError(errno.EIO, f"{source.name} ends early")
        target.write(chunk)
        begin += len(chunk)
    target.flush()


@dataclass(frozen=True)
class IndexedDataset:
    """One dataset, mapped into memory: `tokens` [num_tokens], `offsets` [num_documents + 1] in tokens."""

    prefix: str
    tokens: Tokens
    offsets: npt.NDArray[np.int64]
    """Document d is tokens[offsets[d] : offsets[d + 1]]."""

    @property
    def num_documents(self) -> int:
        """Documents in the dataset."""
        return len(self.offsets) - 1

    def document(self, number: int) -> Tokens:
        """Ids of one document."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]


def open_indexed(prefix: str) -> IndexedDataset:
    """Map PREFIX.bin and PREFIX.idx; UserError if one is missing, empty, cut short, or does not fit the other."""
    for path in (idx_path(prefix), bin_path(prefix)):
        _check_file(path, prefix)
    dtype, sizes, pointers, documents = _read_index(idx_path(prefix))
    _check_layout(prefix, dtype, sizes, pointers, documents)
    starts = np.concatenate([pointers // dtype.itemsize, np.array([sizes.sum(dtype=np.int64)])])
    return IndexedDataset(prefix, np.asarray(np.memmap(bin_path(prefix), dtype, mode="r")), starts[documents])


def _check_file(path: Path, prefix: str) -> None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        path.open("rb").close()
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; build the dataset with `megallama data build SOURCE --output {prefix}`"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that, or build the dataset again") from None
    if found.st_size == 0:
        raise UserError(f"{path} is empty; build the dataset again")


def _read_index(
    path: Path,
) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    content = np.memmap(path, np.uint8, mode="r")
    head = content[: HEADER.size].tobytes()
    if not head.startswith(MAGIC):
        raise UserError(f"{path} starts with {head[:9]!r}, not {MAGIC!r}: it is no Megatron .idx file")
    if len(head) < HEADER.size:
        raise UserError(f"{path} is cut short: {len(content)} bytes, its header has {HEADER.size}; build it again")
    _, version, code, num_sequences, num_entries = HEADER.unpack(head)
    if version != 1 or code not in DTYPE_CODES:
        raise UserError(f"{path} has version {version} and token type {code}; known: version 1, types {[*DTYPE_CODES]}")
    expected = HEADER.size + 12 * num_sequences + 8 * num_entries
    if len(content) not in (expected, expected + num_sequences):
        raise UserError(f"{path} is cut short or damaged: {len(content)} bytes, its header promises {expected}")
    sizes = np.frombuffer(content, "<i4", num_sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    documents = np.frombuffer(content, "<i8", num_entries, HEADER.size + 12 * num_sequences)
    return np.dtype(DTYPE_CODES[code]), sizes, pointers, documents


def _check_layout(
    prefix: str,
    dtype: np.dtype[Any],
    sizes: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
) -> None:
    # Signs and bounds first: then no sum below can wrap around.
    closed = len(documents) > 0 and documents[0] == 0 and documents[-1] == len(sizes)
    sound = closed and (sizes >= 0).all() and documents.min() >= 0 and (np.diff(documents) >= 0).all()
    found, expected = bin_path(prefix).stat().st_size, int(sizes.sum(dtype=np.int64)) * dtype.itemsize
    if sound and found != expected:
        raise UserError(
            f"{bin_path(prefix)} has {found} bytes and its index promises {expected}: cut short, or of another dataset"
        )
    begins = np.cumsum(sizes, dtype=np.int64) - sizes
    if not sound or not np.array_equal(pointers, begins * dtype.itemsize):
        raise UserError(f"{idx_path(prefix)} is damaged: sequences or documents are out of order; build it again")
