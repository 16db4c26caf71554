"""Every format gives the same documents in the same order, and broken input is named by file and line."""

from __future__ import annotations

import gzip
import json
import os
import socket
import time
from pathlib import Path

import pytest
import zstandard

from megallama.corpus.reading import bombs
from megallama.corpus.reading import json_lines as reader
from megallama.corpus.reading.corpora import describe_source, iterate_documents, source_files
from megallama.errors import UserError


def json_lines(documents: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: document}) + "\n" for document in documents).encode()


def test_every_format_gives_the_same_documents(tmp_path: Path, documents: list[str]) -> None:
    lines = json_lines(documents)
    half = len(lines) // 2
    frames = zstandard.compress(lines[:half]) + zstandard.compress(b"") + zstandard.compress(lines[half:])
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    contents = {"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines), "c.jsonl.zst": frames}
    contents["d.jsonl.zst"] = skippable + zstandard.compress(lines)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert list(iterate_documents([str(tmp_path / name)])) == documents, name


def test_the_field_is_a_choice_and_empty_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "", "two"], "content") + b"\n\n")
    assert list(iterate_documents([str(tmp_path / "a.jsonl")], "content")) == ["one", "two"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b \ud83d\ude42"}')
    assert list(iterate_documents([str(tmp_path / "a.jsonl")])) == ["a\ufffdb 🙂"]


def test_folders_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("z.txt", "b/y.txt", "a/x.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "ignored.md").write_text("no")
    assert list(iterate_documents([str(tmp_path)])) == ["a.txt", "a/x.txt", "b/y.txt", "z.txt"]


def test_a_pattern_stands_for_files_and_folders_that_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2/y.jsonl", "a/x.jsonl", "a/[1].txt", "c/x.txt", "c/x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    for pattern, files in [
        ("**/*.jsonl", ["a/x.jsonl", "b/2/y.jsonl"]),
        ("[ab]", ["a/[1].txt", "a/x.jsonl", "b/2/y.jsonl"]),
        ("*/x.*", ["a/x.jsonl", "c/x.txt"]),
        ("a/[1].txt", ["a/[1].txt"]),
        ("**", ["a/[1].txt", "a/x.jsonl", "b/2/y.jsonl", "c/x.txt"]),
    ]:
        assert [file.as_posix() for file in source_files(pattern)] == files, pattern
        assert source_files(f"{tmp_path}/{pattern}") == [tmp_path / file for file in files], pattern
    for pattern, message in [("*.md", "matches no .txt"), ("a**b/x", "is no pattern of files")]:
        with pytest.raises(UserError, match=message):
            source_files(pattern)


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} " + "x" * 5000 + "\r\n\r\n" for i in range(700))
    (tmp_path / "a.txt").write_bytes(text.encode())
    documents = list(iterate_documents([str(tmp_path / "a.txt")]))
    assert "".join(documents) == text
    assert len(documents) == 4
    assert all(document.startswith("paragraph") for document in documents)


def test_stdlib_is_sorted_large_and_without_tests() -> None:
    files = source_files("stdlib")
    assert {"ast.py", "typing.py", "threading.py"} <= {file.name for file in files}
    assert not any({"test", "tests", "site-packages"} & set(file.parts[-3:]) for file in files)
    assert sum(len(document) for document in iterate_documents(["stdlib"])) > 5_000_000


def test_a_change_of_a_file_changes_the_state(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = describe_source(str(tmp_path))
    assert describe_source(str(tmp_path)) == before
    (tmp_path / "a.txt").write_text("three")
    assert describe_source(str(tmp_path))["state"] != before["state"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", r"a\.jsonl:2 is no JSON"),
        (b"[" * 100_000, r"a\.jsonl:2 is no JSON"),
        (b'{"text": "\xff"}', r"a\.jsonl:2 is no JSON"),
        (b'{"content": "x"}', r"a\.jsonl:2 has no text in field 'text', only content"),
        (b'{"text": 3}', r"a\.jsonl:2 has a number in field 'text', not text; .* --text-field"),
        (b'{"text": null}', r"a\.jsonl:2 has null in field 'text'"),
        (b'{"text": false}', r"a\.jsonl:2 has a boolean in field 'text'"),
        (b'{"text": ["a"]}', r"a\.jsonl:2 has an array in field 'text'"),
        (b'["text"]', r"a\.jsonl:2 is an array, not a JSON object; write it as {'text': \.\.\.}"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        list(iterate_documents([str(tmp_path / "a.jsonl")]))


@pytest.mark.parametrize("suffix", ["zst", "gz"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_archive_is_refused(tmp_path: Path, documents: list[str], suffix: str, damage: str) -> None:
    lines = json_lines(documents * 50)
    content = zstandard.compress(lines) if suffix == "zst" else gzip.compress(lines)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"this is not compressed")
    with pytest.raises(UserError, match="damaged or cut short"):
        list(iterate_documents([str(path)]))


def packed(suffix: str, content: bytes) -> bytes:
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}
    return pack[suffix](content)


FORMATS = pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])


@pytest.mark.parametrize(
    ("suffix", "unit", "times"),
    [(suffix, unit, 60_000) for suffix in ("jsonl", "jsonl.gz", "jsonl.zst") for unit in (b"\n", b'{"text": ""}\n')]
    + [(suffix, b" " * 999 + b"\n", 6000) for suffix in ("jsonl.gz", "jsonl.zst")],
)
def test_a_bomb_is_refused_in_every_compression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, unit: bytes, times: int
) -> None:
    monkeypatch.setattr(bombs, "STRETCH", 2_000_000)
    monkeypatch.setattr(reader, "LONGEST_GAP", 50_000)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(packed(suffix, b'{"text": "a"}\n' + unit * times))
    with pytest.raises(UserError, match=rf"a\.{suffix}.* refused as a bomb"):
        list(iterate_documents([str(path)]))


def test_a_bomb_of_newlines_is_read_for_a_moment_only(tmp_path: Path) -> None:
    """A hundred megabytes of a file that goes on for ever."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * (100 << 20), 1))
    begin = time.process_time()
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:1000002 has 1,000,001 lines in a row without text"):
        list(iterate_documents([str(path)]))
    assert time.process_time() - begin < 5


@FORMATS
def test_text_that_repeats_itself_is_no_bomb(tmp_path: Path, suffix: str) -> None:
    """It may shrink by more than a thousand times, as a bomb does."""
    content = (json.dumps({"text": "the same text again and again. " * 2000}).encode() + b"\n" * 1000) * 300
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(packed(suffix, content))
    assert sum(1 for _ in iterate_documents([str(path)])) == 300
    if suffix == "jsonl.zst":
        assert len(content) > 1000 * path.stat().st_size


def test_a_source_that_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read \(it is no regular file\)"):
        list(iterate_documents([str(tmp_path / "a.jsonl")]))


def test_a_record_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (65 << 20) + b'"}')
    with pytest.raises(UserError, match="64 MiB"):
        list(iterate_documents([str(path)]))


def test_sources_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for source, message in [
        ("missing", "does not exist"),
        ("a.pdf", "no known kind"),
        (".", "holds no"),
        ("latin.txt", "not UTF-8"),
    ]:
        if source == ".":
            (tmp_path / "empty").mkdir()
            source = "empty"
        with pytest.raises(UserError, match=message):
            list(iterate_documents([str(tmp_path / source)]))


def test_no_source_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'' names nothing; .*`\.` for"):
        source_files("")
    assert source_files(".") == [Path("a.txt")]


def test_sources_that_the_system_refuses_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = str(tmp_path / ("x" * 300)) + ".txt"
    with pytest.raises(UserError, match=r"x\.txt cannot be read \(File name too long\)"):
        describe_source(long)
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("a.txt")
        with pytest.raises(UserError, match=r"a\.txt cannot be read \(No such device or address\)"):
            list(iterate_documents(["a.txt"]))
