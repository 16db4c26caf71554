"""How long the documents of a dataset are, counted exactly, in memory that does not depend on their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megallama.data.indexed import IndexedDataset

FINE = 1 << 20
"""Below this a length has a counter of its own; longer documents are few, and listed."""


class Bin(NamedTuple):
    """Documents of at_least to below tokens."""

    at_least: int
    below: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """Of all documents: each length that occurs, ascending, and how many have it."""

    values: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    longest: int
    """Number of the first document that is as long as any."""
    empty: int
    """Documents without a token, or with the end of a document alone."""

    def quantile(self, share: float) -> int:
        """The least length that this share of the documents do not exceed."""
        ends = np.cumsum(self.counts)
        return int(self.values[np.searchsorted(ends, share * ends[-1])])

    def histogram(self) -> list[Bin]:
        """By powers of two, from the first that documents have to the last."""
        bits = np.frexp(self.values)[1]
        documents = np.bincount(bits, self.counts).astype(np.int64)
        tokens = np.zeros(len(documents), np.int64)
        np.add.at(tokens, bits, self.values * self.counts)
        return [
            Bin((1 << bit) >> 1, 1 << bit, int(documents[bit]), int(tokens[bit]))
            for bit in range(int(bits[0]), len(documents))
        ]


def count_lengths(dataset: IndexedDataset, eod_id: int | None) -> Lengths:
    """Of a dataset whose documents end with `eod_id`, if that is known."""
    counts, long = np.zeros(FINE, np.int64), [np.zeros(0, np.int64)]
    first, begin, empty = 0, 0, 0
    longest, most = 0, -1
    for lengths in dataset.offsets.lengths():
        counts += np.bincount(lengths[lengths < FINE], minlength=FINE)
        long.append(lengths[lengths >= FINE])
        if lengths.max() > most:
            longest, most = first + int(lengths.argmax()), int(lengths.max())
        ends = begin + np.cumsum(lengths)
        if eod_id is not None:
            empty += int((dataset.tokens[ends[lengths == 1] - 1] == eod_id).sum())
        first, begin = first + len(lengths), int(ends[-1])
    values, repeated = np.unique(np.concatenate(long), return_counts=True)
    short = np.flatnonzero(counts)
    values, repeated = np.concatenate([short, values]), np.concatenate([counts[short], repeated])
    return Lengths(values, repeated, longest, empty + int(counts[0]))
