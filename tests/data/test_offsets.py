"""Offsets that are looked up in the index are those of an array."""

from __future__ import annotations

import numpy as np
import pytest

from megallama.data.offsets import Offsets

DOCUMENTS = np.array([0, 2, 2, 3, 6, 6])
POINTERS = np.array([0, 8, 12, 12, 12, 20])
EXPECTED = [0, 3, 3, 3, 7, 7]
"""The same in tokens of four bytes: the third sequence and the fourth are empty."""


@pytest.fixture
def offsets() -> Offsets:
    return Offsets(POINTERS, DOCUMENTS, 4, 7, range(len(DOCUMENTS)))


def test_numbers_slices_and_arrays_are_those_of_an_array(offsets: Offsets) -> None:
    expected = np.array(EXPECTED)
    assert [offsets[place] for place in range(-6, 6)] == EXPECTED * 2
    for some in (slice(1, 4), slice(3, None), slice(None, -2), slice(0, 0)):
        assert np.asarray(offsets[some]).tolist() == expected[some].tolist()
        assert len(offsets[some]) == len(expected[some])
    assert offsets[2:][1:][-1] == 7
    assert np.diff(offsets).tolist() == np.diff(expected).tolist()
    with pytest.raises(IndexError):
        offsets[6]


@pytest.mark.parametrize("side", ["left", "right"])
def test_searches_are_those_of_numpy(offsets: Offsets, side: str) -> None:
    tokens = list(range(-1, 9))
    assert np.searchsorted(offsets, tokens, side).tolist() == np.searchsorted(EXPECTED, tokens, side).tolist()
    assert int(np.searchsorted(offsets[1:], 5, side)) == 3


def test_a_search_makes_no_array(offsets: Offsets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which for each sample would be one of the length of the dataset."""
    monkeypatch.setattr(Offsets, "__array__", None)
    assert np.searchsorted(offsets, [4], side="right").tolist() == [4]


@pytest.mark.parametrize("chunk", [1, 2, 5, 6])
def test_lengths_are_those_of_all_documents(offsets: Offsets, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.data.offsets.CHUNK", chunk)
    assert np.concatenate([*offsets.lengths()]).tolist() == [3, 0, 0, 4, 0]
