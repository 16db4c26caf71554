"""The tensors of a checkpoint: plain fp32 numbers in files, at the places that tensors.json names. Nothing to unpickle.

Read whole and alone, with numpy: what only looks at a checkpoint waits for no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megallama.checkpoint.format import (
    LARGEST,
    NUMBERS,
    TENSORS,
    Count,
    File,
    TornCheckpointError,
    malformed,
    plain,
    read_manifest,
)
from megallama.system.regular_file import read_regular

Array = NDArray[np.float32]
Indices = NDArray[np.int64]
Shape = tuple[int, ...]
ELEMENT = 4
"""Bytes of an fp32 number: everything in a checkpoint is one."""
EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
Extent = Annotated[int, Field(ge=1, lt=LARGEST)]
_DIMENSIONS = Field(min_length=1, max_length=8)
_PIECE = 1 << 24
"""Bytes read at once."""
_LARGEST_TABLE = 1 << 26
"""Bytes that tensors.json may have in any case; beyond that as many as the numbers, of which it takes a thousandth."""
_LEAST_BLOCKS, _BLOCKS_PER_CHUNK = 1 << 24, 1 << 12
"""Limits of the grid that the edges of a tensor's chunks make; some thousand ranks make a thousandth of it."""
MOMENTS = EXP_AVG, EXP_AVG_SQ
_OPTIMIZER, _AVERAGE = "optimizer.", "average."


def moment_name(moment: str, weight: str) -> str:
    """The name under which a moment of the logical tensor `weight` is stored."""
    return f"{_OPTIMIZER}{moment}.{weight}"


def average_name(weight: str) -> str:
    """The name under which the average of the logical tensor `weight` is stored."""
    return f"{_AVERAGE}{weight}"


def is_average(name: str) -> bool:
    """Whether the tensor stored under `name` is the average of a weight."""
    return name.startswith(_AVERAGE)


def is_weight(name: str) -> bool:
    """Whether the tensor stored under `name` is a weight, not a moment or the average of one."""
    return not name.startswith((_OPTIMIZER, _AVERAGE))


class Chunk(BaseModel):
    """A rectangle of a tensor, in row-major order in a file."""

    model_config = ConfigDict(frozen=True, strict=True)

    offset: Annotated[tuple[Count, ...], _DIMENSIONS]
    """Where it begins in the tensor."""
    shape: Annotated[tuple[Extent, ...], _DIMENSIONS]
    file: str
    start: int = Field(ge=0, lt=LARGEST, multiple_of=ELEMENT)
    """Its first byte in the file."""

    @property
    def bytes(self) -> int:
        """The bytes that it takes in the file."""
        return ELEMENT * math.prod(self.shape)

    @property
    def here(self) -> tuple[slice, ...]:
        """The part of the tensor that it is."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))


class Places(BaseModel):
    """Where a tensor is: chunks that hold each of its elements once."""

    model_config = ConfigDict(frozen=True, strict=True)

    shape: Annotated[tuple[Extent, ...], _DIMENSIONS]
    chunks: tuple[Chunk, ...]


class _Document(BaseModel):
    """What tensors.json holds."""

    model_config = ConfigDict(frozen=True, strict=True)

    dtype: Literal["float32"]
    tensors: dict[str, Places]


class Stored:
    """The tensors of the checkpoint at `path` by name.

    TornCheckpointError if it is not a whole one, or tensors.json does not say of each element where it is, once.
    """

    def __init__(self, path: Path) -> None:
        self._path, files = path, read_manifest(path).files
        self._tensors = read_places(path, files)
        self._by_file: dict[str, list[tuple[str, Chunk]]] = {}
        for name, tensor in self._tensors.items():
            for chunk in tensor.chunks:
                self._by_file.setdefault(chunk.file, []).append((name, chunk))
        self._maps: dict[str, Array] = {}

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Array:
        """One tensor, whole, in memory of its own, which is all that it takes."""
        whole = np.empty(self._tensors[name].shape, dtype=np.float32)
        for chunk in self._tensors[name].chunks:
            part = whole[chunk.here]
            rows = max(1, _PIECE // (chunk.bytes // chunk.shape[0]))
            with (self._path / chunk.file).open("rb") as file:
                file.seek(chunk.start)
                for first in range(0, len(part), rows):
                    some = part[first : first + rows]
                    some[...] = np.fromfile(file, np.float32, some.size).reshape(some.shape)
        return whole

    def places(self, name: str) -> list[tuple[Shape, Shape]]:
        """Where each part of one tensor begins, and its shape."""
        return [(chunk.offset, chunk.shape) for chunk in self._tensors[name].chunks]

    def chunks(self, name: str) -> Iterator[tuple[Shape, Array]]:
        """The parts of one tensor: where each begins, and its numbers, mapped from the file."""
        return ((chunk.offset, self._map(chunk)) for chunk in self._tensors[name].chunks)

    def numbers(self, file: str) -> Iterator[tuple[str, Array]]:
        """The parts of all tensors that are in one file: the tensor's name, and its numbers, mapped from the file."""
        return ((name, self._map(chunk)) for name, chunk in self._by_file.get(file, ()))

    def _map(self, chunk: Chunk) -> Array:
        if chunk.file not in self._maps:
            # Private and writable: torch takes no memory that is read-only, and nothing reaches the file.
            self._maps[chunk.file] = np.memmap(self._path / chunk.file, dtype=np.float32, mode="c")
        begin, end = chunk.start // ELEMENT, (chunk.start + chunk.bytes) // ELEMENT
        return self._maps[chunk.file][begin:end].reshape(chunk.shape)


def read_places(path: Path, files: Mapping[str, File]) -> dict[str, Places]:
    """Where every tensor of the checkpoint at `path` is in `files`, those of its manifest.

    TornCheckpointError if tensors.json is malformed, names a place that is not there, says of an element never or
    twice where it is, or has one place for two.
    """
    most = max(_LARGEST_TABLE, sum(file.bytes for name, file in files.items() if NUMBERS.fullmatch(name)))
    try:
        tensors = _Document.model_validate_json(read_regular(path / TENSORS, most, follow=False)).tensors
    except OSError as error:
        raise TornCheckpointError(f"{TENSORS} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise malformed(TENSORS, error) from None
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            _check_chunk(plain(name), tensor, chunk, files)
        _check_cover(plain(name), tensor)
    _check_bytes(tensors)
    return tensors


def _check_chunk(name: str, tensor: Places, chunk: Chunk, files: Mapping[str, File]) -> None:
    """TornCheckpointError if there is no such place in the tensor, or in the files."""
    if chunk.file not in files:
        raise TornCheckpointError(f"{TENSORS} names the file {chunk.file!r:.80}, which is not in the manifest")
    if not NUMBERS.fullmatch(chunk.file):
        raise TornCheckpointError(f"{TENSORS} has numbers of {name} in {chunk.file}")
    if chunk.start + chunk.bytes > files[chunk.file].bytes:
        raise TornCheckpointError(f"{TENSORS} has a chunk of {name} beyond the end of {chunk.file}")
    ranks = len(tensor.shape), len(chunk.offset), len(chunk.shape)
    ends = [o + n for o, n in zip(chunk.offset, chunk.shape, strict=False)]
    if len(set(ranks)) > 1 or any(end > size for end, size in zip(ends, tensor.shape, strict=True)):
        raise TornCheckpointError(
            f"{TENSORS} has a chunk of {name} outside of it: {list(chunk.shape)} from {list(chunk.offset)} on, "
            f"and the tensor is {list(tensor.shape)}"
        )


def _check_cover(name: str, tensor: Places) -> None:
    """TornCheckpointError if an element is in no chunk, or in more than one."""
    first = np.array([chunk.offset for chunk in tensor.chunks], dtype=np.int64).reshape(-1, len(tensor.shape))
    end = first + np.array([chunk.shape for chunk in tensor.chunks], dtype=np.int64).reshape(first.shape)
    # Between neighbouring edges of chunks all elements are in the same chunks: one count stands for a block of them.
    edges = [np.unique([0, size, *first[:, dim], *end[:, dim]]) for dim, size in enumerate(tensor.shape)]
    blocks = math.prod(map(len, edges))
    if blocks > max(_LEAST_BLOCKS, _BLOCKS_PER_CHUNK * len(tensor.chunks)):
        raise TornCheckpointError(f"{TENSORS} cuts {name} into {blocks} blocks by {len(tensor.chunks)} chunks")
    counts = _counts(edges, first, end)
    wrong = np.argwhere(counts != 1)
    if len(wrong):
        element = [int(edge[block]) for edge, block in zip(edges, wrong[0], strict=True)]
        times = int(counts[tuple(wrong[0])])
        found = f"{times} chunks" if times else "no chunk"
        raise TornCheckpointError(f"{TENSORS} has element {element} of {name} in {found}")


def _check_bytes(tensors: Mapping[str, Places]) -> None:
    """TornCheckpointError if a byte of a file is in two chunks."""
    taken: dict[str, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            taken.setdefault(chunk.file, []).append((chunk.start, chunk.start + chunk.bytes, name))
    for file, places in taken.items():
        places.sort()
        for (_, end, name), (start, _, other) in pairwise(places):
            if start < end:
                raise TornCheckpointError(
                    f"{TENSORS} has byte {start} of {file} in {plain(name)} and in {plain(other)}"
                )


def _counts(edges: list[Indices], first: Indices, end: Indices) -> Indices:
    """How many rectangles from `first` to `end`, [rectangle, dim], hold each block between neighbouring `edges`.

    A rectangle adds one to all blocks from its first corner on and, with alternating signs, from its others on: in the
    sum over all blocks before, only those inside are left with one. A loop over rectangles would take minutes where a
    thousand ranks have saved.
    """
    counts = np.zeros([len(edge) for edge in edges], dtype=np.int64)
    sides = [
        ((1, np.searchsorted(edge, first[:, dim])), (-1, np.searchsorted(edge, end[:, dim])))
        for dim, edge in enumerate(edges)
    ]
    for corner in product(*sides):
        np.add.at(counts, tuple(block for _, block in corner), math.prod(sign for sign, _ in corner))
    for dim in range(len(edges)):
        counts = counts.cumsum(axis=dim)
    return counts[tuple(slice(-1) for _ in edges)]
