"""Curves with fewer points in which every extremum is still to be seen."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def thinned(values: Sequence[float | None], buckets: int) -> list[int]:
    """Indices, ascending, of the values to keep: of each of `buckets` equal parts, its least, its greatest, its first
    None, which is a gap in the line; and the first and last value of all.

    A part is about as wide as a pixel of a plot, in which a line through all values would paint just the pixels from
    the least to the greatest.
    """
    if len(values) <= 2 * buckets:
        return list(range(len(values)))
    known = np.array([np.nan if value is None else value for value in values], float)
    gaps = np.isnan(known)
    low, high = np.where(gaps, np.inf, known), np.where(gaps, -np.inf, known)  # nanargmin takes several times as long
    kept = {0, len(values) - 1}
    edges = np.linspace(0, len(values), buckets + 1).astype(int).tolist()
    for begin, end in pairwise(edges):
        if gaps[begin:end].any():
            kept.add(begin + int(gaps[begin:end].argmax()))
        if not gaps[begin:end].all():
            kept.update((begin + int(low[begin:end].argmin()), begin + int(high[begin:end].argmax())))
    return sorted(kept)
