"""Columns of text, whatever their type, and what is wrong with a row, a row group or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megallama.errors import UserError
from tests.corpus.test_blocks import check_shares, read


def table(values: Any, kind: Any = None) -> Any:
    return pyarrow.table({"text": pyarrow.array(values, kind)})


def bad_utf8() -> Any:
    offsets = pyarrow.array([0, 1, 2], pyarrow.int32()).buffers()[1]
    return pyarrow.table({"text": pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"\xffa"))})


def put(path: Path, content: Any, rows: int = 2) -> Path:
    pyarrow.parquet.write_table(content, path, row_group_size=rows, compression="none")
    return path


@pytest.mark.parametrize(
    ("content", "texts", "left_out", "message"),
    [
        (table(["a", "b", None]), ["a", "b"], {"missing field": 1}, "has null in .* 'text' at row 1 of row group 1"),
        (table([1, 2, 3]), [], {"not text": 3}, "has int64 in column 'text', not text"),
        (pyarrow.table({"other": ["a"]}), [], {"missing field": 1}, "has no text in column 'text', only other"),
        (table(["x" * (65 << 20), "a"]), ["a"], {"too long": 1}, "more than 64 MiB at row 1 of row group 0"),
        (bad_utf8(), ["a"], {"not UTF-8": 1}, r"not UTF-8 near b'\\xff' at row 1"),
    ],
    ids=["null", "numbers", "other column", "too long", "not UTF-8"],
)
def test_what_is_no_text_is_counted_or_named(
    tmp_path: Path, content: Any, texts: list[str], left_out: dict[str, int], message: str
) -> None:
    path = put(tmp_path / "a.parquet", content)
    blocks = read(path)
    assert [text for block in blocks for text in block[1]] == texts
    kinds = set(left_out)
    assert {kind: sum(block[2].get(kind, 0) for block in blocks) for kind in kinds} == left_out
    assert set().union(*(block[2] for block in blocks)) == kinds
    with pytest.raises(UserError, match=message):
        read(path, on_error="stop")


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["a", "", "a", "b"]),
        pyarrow.array(["a", "", "a", "b"], pyarrow.large_string()),
        pyarrow.array(["a", "", "a", "b"]).dictionary_encode(),
    ],
    ids=["string", "large_string", "dictionary"],
)
def test_columns_of_every_type_of_text_are_read(tmp_path: Path, column: Any) -> None:
    found = check_shares(put(tmp_path / "a.parquet", pyarrow.table({"number": range(4), "text": column})))
    assert found == [(0, ["a"], {"empty": 1}), (1, ["a", "b"], {})]


def test_a_field_of_a_struct_is_named_with_a_dot(tmp_path: Path) -> None:
    structs = pyarrow.array([{"b": "x", "c": 1}, None, {"b": None, "c": 1}, {"b": "y", "c": 2}])
    path = put(tmp_path / "a.parquet", pyarrow.table({"a": structs}), rows=4)
    assert read(path, text_field="a.b") == [(0, ["x", "y"], {"missing field": 2})]
    assert read(path, text_field="a") == [(0, [], {"not text": 4})]
    path = put(tmp_path / "b.parquet", pyarrow.table({"a": structs, "a.b": ["p", "q", "r", "s"]}), rows=4)
    assert read(path, text_field="a.b") == [(0, ["p", "q", "r", "s"], {})]


def test_damage_is_of_a_row_group_or_of_the_file(tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet", table([f"{number:050}" for number in range(100)]), rows=10)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    blocks = check_shares(path)
    assert blocks[0] == (0, [], {"damaged stream": 1})
    assert [len(block[1]) for block in blocks[1:]] == [10] * 9
    for damaged in (content[:1000], b"", b"PAR1" * 100):
        path.write_bytes(damaged)
        assert check_shares(path) == [(0, [], {"damaged stream": 1})]
        with pytest.raises(UserError, match=r"a\.parquet is damaged or cut short"):
            read(path, on_error="stop")
