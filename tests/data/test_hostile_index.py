"""An index that claims anything is refused in one sentence, at once, and in the memory of a small one."""

from __future__ import annotations

import os
import random
import resource
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megallama.data.indexed import HEADER, MAGIC, open_indexed
from megallama.errors import UserError
from tests.corpus.mutating import EDGES
from tests.corpus.test_hostile_files import documents_of

MOST_MEMORY = 1 << 20
"""Bytes; none of the claims below is that small."""


def index(sizes: list[int], pointers: list[int], documents: list[int], code: int = 8, modes: bytes = b"") -> bytes:
    head = HEADER.pack(MAGIC, 1, code, len(sizes), len(documents))
    arrays = struct.pack(f"<{len(sizes)}i{len(pointers)}q{len(documents)}q", *sizes, *pointers, *documents)
    return head + arrays + modes


def put(prefix: Path, idx: bytes, content: bytes) -> str:
    prefix.with_suffix(".idx").write_bytes(idx)
    prefix.with_suffix(".bin").write_bytes(content)
    return str(prefix)


def refusal(prefix: str) -> str:
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            open_indexed(prefix)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("sequences", [2, 2**31, 2**59, 2**60, 2**61, 2**62, 2**63, 2**64 - 1])
@pytest.mark.parametrize("entries", [0, 2**60, 2**61, 2**63, 2**64 - 1])
def test_counts_that_the_file_cannot_hold_are_refused(tmp_path: Path, sequences: int, entries: int) -> None:
    """12 bytes for each and 8 for each are, in 64 bits, those of the file for some of these."""
    idx = HEADER.pack(MAGIC, 1, 8, sequences, entries) + bytes(100)
    said = refusal(put(tmp_path / "d", idx, bytes(8)))
    assert f"134 bytes, its header promises {34 + 12 * sequences + 8 * entries}" in said


@pytest.mark.parametrize(
    ("sizes", "pointers", "documents", "said"),
    [
        ([2, 2], [0, 4], [0, 1], "out of order"),
        ([2, 2], [0, 4], [1, 2], "out of order"),
        ([2, 2], [0, 4], [0, 3, 2], "out of order"),
        ([2, 2], [0, 4], [0, -1, 2], "out of order"),
        ([2, 2], [0, 4], [0, 2**62 + 1, -(2**62), 2], "out of order"),
        ([2, 2], [0, 4], [], "out of order"),
        ([2, 2], [0, 4], [0], "out of order"),
        ([1, 2], [2, 4], [0, 1, 2], "out of order"),
        ([2, 2], [0, 3], [0, 1, 2], "its index promises 7"),
        ([2, 2], [0, 2**40], [0, 1, 2], f"its index promises {2**40 + 4}"),
        ([2, 2], [0, -4], [0, 1, 2], "out of order"),
        ([1, 1, 2], [0, 3, 4], [0, 3], "out of order"),
        ([6, -4, 2], [0, 12, 4], [0, 3], "out of order"),
        ([2, 4, -2], [0, 4, 12], [0, 3], "out of order"),
        ([2**31 - 1, -(2**31), 2, 3], [0, 2**32 - 2, -2, 2], [0, 4], "out of order"),
        ([0, 2, 2], [0, -(2**63), 4], [0, 3], "out of order"),
        ([], [], [0], "has 8 bytes and its index promises 0"),
        ([], [], [0, 0, 0], "has 8 bytes and its index promises 0"),
        ([], [], [], "out of order"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, sizes: list[int], pointers: list[int], documents: list[int], said: str
) -> None:
    assert said in refusal(put(tmp_path / "d", index(sizes, pointers, documents), bytes(8)))


def test_what_is_wrong_beyond_the_first_stretch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.data.indexed.AT_ONCE", 4)
    rows = [[1] * 10, [2 * number for number in range(10)], list(range(11))]
    expected = [[number] for number in range(10)]
    content = np.arange(10, dtype="<u2").tobytes()
    found = open_indexed(put(tmp_path / "d", index(*rows), content))
    assert [found.document(number).tolist() for number in range(10)] == expected
    for row in range(3):
        for place in range(10):
            changed = [[*values] for values in rows]
            changed[row][place] += 100
            refusal(put(tmp_path / "d", index(*changed), content))


@pytest.mark.parametrize("extra", [-8, -2, -1, 1, 2, 1 << 42])
def test_a_bin_of_another_length_is_refused(tmp_path: Path, extra: int) -> None:
    prefix = put(tmp_path / "d", index([2, 2], [0, 4], [0, 1, 2]), bytes(8))
    os.truncate(f"{prefix}.bin", 8 + extra)
    expected = f"has {8 + extra} bytes and its index promises 8" if extra > -8 else "d.bin is empty"
    assert expected in refusal(prefix)


@pytest.mark.parametrize("sequences", [2, (1 << 42) // 20])
def test_terabytes_without_content_in_the_place_of_an_index_are_refused(tmp_path: Path, sequences: int) -> None:
    """The header promises few, or as many as there is room for."""
    prefix = put(tmp_path / "d", HEADER.pack(MAGIC, 1, 8, sequences, sequences + 1), bytes(8))
    os.truncate(f"{prefix}.idx", 34 + 20 * ((1 << 42) // 20) + 8)
    assert ("out of order" if sequences > 2 else "its header promises 82") in refusal(prefix)


def test_an_index_that_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    prefix = put(tmp_path / "d", index([2, 2], [0, 4], [0, 1, 2]), bytes(8))
    os.truncate(prefix + ".idx", 1 << 42)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, limits[1]))
    try:
        assert "d.idx cannot be read (Cannot allocate memory)" in refusal(prefix)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path, suffix: str) -> None:
    prefix = put(tmp_path / "d", index([2, 2], [0, 4], [0, 1, 2]), bytes(8))
    Path(prefix + suffix).unlink()
    Path(prefix + suffix).mkdir()
    assert f"d{suffix} cannot be read (it is no regular file)" in refusal(prefix)


def test_whatever_numbers_are_changed_it_is_refused_or_read_as_what_it_says(tmp_path: Path) -> None:
    """Documents of several sequences and of none, sequences without a token, every type, with modes and without."""
    draw = random.Random(16)
    shape = [3, 0, 2, 4, 1], [0, 2, 2, 3, 5, 5]
    width_of = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
    accepted = 0
    for _ in range(250):
        code = draw.choice([*width_of])
        sizes, documents = shape
        pointers = [sum(sizes[:number]) * width_of[code] for number in range(len(sizes))]
        idx = bytearray(index(sizes, pointers, documents, code, draw.choice([b"", b"\1" * 5])))
        content = draw.randbytes(10 * width_of[code])
        for _ in range(draw.randrange(3)):
            place, width = draw.choice([(9, 8), (17, 1), (18, 8), (26, 8), (34, 4), (54, 8), (94, 8)])
            if place >= 34:
                place += width * draw.randrange(5)
            value = draw.choice([*EDGES, int.from_bytes(idx[place : place + width], "little") + draw.choice([-1, 1])])
            idx[place : place + width] = (value % 256**width).to_bytes(width, "little")
        try:
            found = open_indexed(put(tmp_path / "d", bytes(idx), content))
        except UserError:
            continue
        accepted += 1
        expected = documents_of({"X.idx": bytes(idx), "X.bin": content})
        assert [found.document(number).tolist() for number in range(found.num_documents)] == expected
    assert accepted > 60


def test_many_documents_take_no_more_memory_than_few(tmp_path: Path) -> None:
    """No copy of the index is made, nor of any array of its length."""
    count = 3_000_000
    with (tmp_path / "d.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, count, count + 1) + np.full(count, 3, "<i4").tobytes())
        file.write(np.arange(0, 6 * count, 6, dtype="<i8").tobytes() + np.arange(count + 1, dtype="<i8").tobytes())
    with (tmp_path / "d.bin").open("wb") as file:
        file.truncate(6 * count)
    tracemalloc.start()
    try:
        found = open_indexed(str(tmp_path / "d"))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1 << 20
    assert peak < 50 << 20
    assert sum(int(lengths.sum()) for lengths in found.offsets.lengths()) == 3 * count
    tokens = [0, 2, 3, 3 * count - 1, 3 * count]
    assert np.searchsorted(found.offsets, tokens, side="right").tolist() == [1, 1, 2, count, count + 1]
