"""Documents whose text stands earlier in the order of the dataset, found in bounded memory.

The hashes of all documents are spread over files by their leading bits, so that equal ones meet in one file that fits
into memory. Two texts are equal if the 128 bits of their BLAKE2b hashes are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megallama.corpus.building.shard import Shard

HASHES_AT_ONCE = 2 << 20
"""That are sorted at once, 24 bytes each."""
OPEN_FILES = 128

_ROW = np.dtype([("hash", "<u8", 2), ("document", "<u8")])


def find_duplicates(shards: Callable[[], Iterable[Shard]], documents: int, folder: Path) -> npt.NDArray[np.bool_]:
    """Of `documents` in all shards, which ones repeat an earlier one, [documents]; mapped from a file in `folder`.

    `shards` gives the shards in order, each time anew.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(max(documents, 1))
        repeated = np.memmap(file, np.bool_, mode="r+", shape=(documents,))
    files = 1 << max(0, (documents - 1) // HASHES_AT_ONCE).bit_length()
    for first in range(0, files, OPEN_FILES):
        with ExitStack() as stack:
            opened = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(min(files, OPEN_FILES))]
            _spread(shards(), opened, first, files)
            for file in opened:
                _mark(file, repeated)
    return repeated


def _spread(shards: Iterable[Shard], opened: Sequence[BinaryIO], first: int, files: int) -> None:
    """Write each hash and its document into the file of its leading bits, if that is one of `opened`, from `first`."""
    begin = 0
    for shard in shards:
        hashes = shard.hashes()
        rows = np.empty(len(hashes), _ROW)
        rows["hash"], rows["document"] = hashes, np.arange(begin, begin + len(hashes))
        begin += len(hashes)
        number = (hashes[:, 0] >> np.uint64(32)).astype(np.int64) % files - first
        order = np.argsort(number, kind="stable")
        bounds = np.searchsorted(number[order], np.arange(len(opened) + 1))
        for file, start, stop in zip(opened, bounds, bounds[1:], strict=False):
            file.write(rows[order[start:stop]].tobytes())


def _mark(file: BinaryIO, repeated: npt.NDArray[np.bool_]) -> None:
    file.seek(0)
    rows = np.frombuffer(file.read(), _ROW)
    order = np.lexsort((rows["document"], rows["hash"][:, 0], rows["hash"][:, 1]))
    hashes = rows["hash"][order]
    again = (hashes[1:] == hashes[:-1]).all(axis=1)
    repeated[rows["document"][order[1:][again]]] = True
