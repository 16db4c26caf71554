"""The bytes are Megatron-LM's, and damage is refused in one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megallama.data.indexed import IndexedWriter, open_indexed, token_dtype
from megallama.errors import UserError

LITERAL_IDX = bytes.fromhex(
    "4d4d4944494458 0000"  # MMIDIDX
    "0100000000000000"  # version
    "08"  # uint16
    "0200000000000000"  # sequences
    "0300000000000000"  # documents and one
    "03000000 02000000"  # sizes
    "0000000000000000 0600000000000000"  # byte offsets
    "0000000000000000 0100000000000000 0200000000000000"  # documents
)
LITERAL_BIN = bytes.fromhex("0100 0200 0300 ff00 0001")

Write = Callable[..., str]


def test_written_bytes_are_the_literal_megatron_bytes(write_dataset: Write) -> None:
    prefix = write_dataset("d", [[1, 2, 3], [255, 256]])
    assert Path(prefix + ".idx").read_bytes() == LITERAL_IDX
    assert Path(prefix + ".bin").read_bytes() == LITERAL_BIN


def test_literal_megatron_bytes_are_read(tmp_path: Path) -> None:
    (tmp_path / "d.idx").write_bytes(LITERAL_IDX)
    (tmp_path / "d.bin").write_bytes(LITERAL_BIN)
    dataset = open_indexed(str(tmp_path / "d"))
    assert [dataset.document(i).tolist() for i in range(dataset.num_documents)] == [[1, 2, 3], [255, 256]]


@pytest.mark.parametrize("modes", [b"", b"\x00\x00\x00"])
def test_documents_of_several_sequences_are_joined(tmp_path: Path, modes: bytes) -> None:
    head = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x04"
    counts = (3).to_bytes(8, "little") + (3).to_bytes(8, "little")
    arrays = np.array([2, 1, 3], "<i4").tobytes() + np.array([0, 8, 12], "<i8").tobytes()
    (tmp_path / "d.idx").write_bytes(head + counts + arrays + np.array([0, 2, 3], "<i8").tobytes() + modes)
    (tmp_path / "d.bin").write_bytes(np.arange(6, dtype="<i4").tobytes())
    dataset = open_indexed(str(tmp_path / "d"))
    assert [dataset.document(i).tolist() for i in range(2)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("vocab_size", "name"), [(65_499, "uint16"), (65_500, "int32"), (128_256, "int32")])
def test_dtype_is_the_one_megatron_picks(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
def test_damaged_files_are_refused(write_dataset: Write, suffix: str, damage: str) -> None:
    path = Path(write_dataset("d", [[1, 2, 3], [4, 5]]) + suffix)
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": content[:-1], "longer": content + b"\x00"}[damage])
    with pytest.raises(UserError, match=str(path)):
        open_indexed(str(path.with_suffix("")))


@pytest.mark.parametrize("length", [4, 9, 20, 33])
def test_an_index_cut_inside_its_header_is_refused(write_dataset: Write, length: int) -> None:
    path = Path(write_dataset("d", [[1, 2, 3]]) + ".idx")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError):
        open_indexed(str(path.with_suffix("")))


@pytest.mark.parametrize(
    ("offset", "byte", "message"),
    [(0, 0, "no Megatron"), (9, 2, "version 2"), (17, 6, "token type 6"), (42, 2, "damaged"), (58, 1, "damaged")],
)
def test_wrong_fields_are_refused(write_dataset: Write, offset: int, byte: int, message: str) -> None:
    path = Path(write_dataset("d", [[1, 2, 3], [4, 5]]) + ".idx")
    content = bytearray(path.read_bytes())
    content[offset] = byte
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_indexed(str(path.with_suffix("")))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_what_is_no_regular_file_is_refused_at_once(write_dataset: Write, suffix: str) -> None:
    path = Path(write_dataset("d", [[1, 2, 3]]) + suffix)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"d\{suffix} cannot be read \(it is no regular file\)"):
        open_indexed(str(path.with_suffix("")))


def test_nothing_appears_before_close(tmp_path: Path) -> None:
    writer = IndexedWriter(str(tmp_path / "d"), token_dtype(10))
    writer.add(np.array([1, 2], "<u2"), np.array([2], "<i4"))
    assert not (tmp_path / "d.bin").exists()
    assert not (tmp_path / "d.idx").exists()
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]
