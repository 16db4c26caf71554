"""Where documents begin, looked up in the index file: no process holds a copy of what all of them map."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 20
"""Documents whose lengths are computed at once."""


class Offsets:
    """[documents + 1] offsets in tokens: where each document begins, and where the last one ends.

    Numbers and slices take a few reads of the index, `np.asarray` and `np.diff` 8 bytes for each document.
    """

    def __init__(
        self,
        pointers: npt.NDArray[np.int64],
        documents: npt.NDArray[np.int64],
        token_bytes: int,
        num_tokens: int,
        numbers: range,
    ) -> None:
        """Of `numbers`, out of all `documents`: the first sequence of each, whose bytes begin at `pointers`."""
        self._pointers = pointers
        self._documents = documents
        self._token_bytes = token_bytes
        self._num_tokens = num_tokens
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, which: int | np.integer[Any]) -> int: ...
    @overload
    def __getitem__(self, which: slice) -> Offsets: ...
    def __getitem__(self, which: int | np.integer[Any] | slice) -> int | Offsets:
        if isinstance(which, slice):
            numbers = self._numbers[which]
            return Offsets(self._pointers, self._documents, self._token_bytes, self._num_tokens, numbers)
        sequence = int(self._documents[self._numbers[which]])
        if sequence == len(self._pointers):
            return self._num_tokens
        return int(self._pointers[sequence]) // self._token_bytes

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.int64]:
        first, end = self._numbers.start, self._numbers.stop
        assert self._numbers.step == 1
        sequences = self._documents[first:end]
        offsets = self._pointers[np.minimum(sequences, len(self._pointers) - 1)] // self._token_bytes
        offsets[sequences == len(self._pointers)] = self._num_tokens
        return offsets if dtype is None else offsets.astype(dtype)

    def searchsorted(
        self, values: npt.ArrayLike, side: Literal["left", "right"] = "left", sorter: None = None
    ) -> npt.NDArray[np.int64]:
        """As of numpy, whose `np.searchsorted` comes here: a look at the index for each bit of its length."""
        assert sorter is None
        find = bisect.bisect_left if side == "left" else bisect.bisect_right
        places = [find(self, value) for value in np.atleast_1d(values).tolist()]
        return np.array(places, dtype=np.int64).reshape(np.shape(values))[()]

    def lengths(self) -> Iterator[npt.NDArray[np.int64]]:
        """Tokens in each document, those of CHUNK documents at a time."""
        for first in range(0, len(self) - 1, CHUNK):
            offsets = np.asarray(self[first : first + CHUNK + 1])
            yield offsets[1:] - offsets[:-1]
