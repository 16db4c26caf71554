"""Readers that share a file find together what one finds alone, in every format and whatever is wrong with it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import zstandard

from megallama.corpus.reading import blocks, bombs, decompress, json_lines, lines, parquet, plain_text
from megallama.corpus.reading.blocks import Reading, read_blocks
from megallama.errors import UserError

BLOCK = 64
Read = list[tuple[int, list[str], dict[str, int]]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, chunks and limits at which files of a kilobyte show what files of a terabyte do."""
    for module in (blocks, json_lines, plain_text):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)
    for module in (lines, decompress):
        monkeypatch.setattr(module, "CHUNK", 40)
    for module in (lines, parquet, plain_text):
        monkeypatch.setattr(module, "LARGEST_RECORD", 2 * BLOCK)
    monkeypatch.setattr(plain_text, "DOCUMENT_BYTES", 20)
    monkeypatch.setattr(lines, "LARGEST_GAP", 4 * BLOCK)
    monkeypatch.setattr(bombs, "STRETCH", 4 * BLOCK)
    for module in (bombs, json_lines):
        monkeypatch.setattr(module, "LONGEST_GAP", 9)


def read(path: Path, share: tuple[int, int] = (0, 1), skip: tuple[int, ...] = (), **rules: Any) -> Read:
    reading = Reading(**{"on_error": "skip", **rules})
    return [
        (block.number, list(block.documents), dict(block.left_out)) for block in read_blocks(path, reading, share, skip)
    ]


def check_shares(path: Path) -> Read:
    whole = read(path)
    assert [number for number, _, _ in whole] == list(range(len(whole)))
    for step in (2, 3, 7):
        assert sorted(block for first in range(step) for block in read(path, (first, step))) == whole
    assert read(path, skip=tuple(range(0, len(whole), 2))) == whole[1::2]
    return whole


def some_lines(random: Random) -> bytes:
    text_share = random.choice([0.05, 0.4, 0.9])
    found: list[bytes] = []
    for _ in range(random.randrange(40)):
        if random.random() < text_share:
            size = random.choice([5, 60, 3 * BLOCK, 6 * BLOCK])
            found.append(json.dumps({"text": "x" * random.randrange(size)}).encode())
        else:
            found.append(
                random.choice(
                    [b"", b" " * random.randrange(50), b'{"text":""}', b"{bad", b'{"text":"\xff"}', b"\n" * 20]
                )
            )
    return b"\n".join(found) + random.choice([b"", b"\n"])


def frames(content: bytes) -> bytes:
    """Many zstd frames, with one to skip between any two."""
    skippable = b"\x53\x2a\x4d\x18\x03\x00\x00\x00abc"
    return b"".join(zstandard.compress(content[at : at + 30]) + skippable for at in range(0, len(content), 30))


@pytest.mark.usefixtures("small")
def test_shares_are_the_whole_whatever_the_lines_hold(tmp_path: Path) -> None:
    kinds = set()
    for seed in range(40):
        random = Random(seed)
        content = some_lines(random)
        zipped, framed = gzip.compress(content), frames(content)
        for name, packed in [
            ("a.jsonl", content),
            ("a.txt", content),
            ("a.jsonl.gz", zipped),
            ("a.jsonl.zst", framed),
            ("cut.jsonl.gz", zipped[: random.randrange(len(zipped))]),
            ("cut.jsonl.zst", framed[: random.randrange(len(framed) + 1)]),
            ("garbled.jsonl.zst", framed[: len(framed) // 2] + b"\x28\xb5\x2f\xfd" + random.randbytes(40)),
        ]:
            (tmp_path / name).write_bytes(packed)
            found = check_shares(tmp_path / name)
            kinds.update(kind for block in found for kind in block[2])
            assert sum(block[2].get("damaged stream", 0) for block in found) <= 1
        assert read(tmp_path / "a.jsonl.gz") == read(tmp_path / "a.jsonl.zst")
    assert kinds - {"long window"} == {"empty", "not JSON", "not UTF-8", "too long", "damaged stream", "bomb"}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("packed", [bytes, zstandard.compress], ids=["jsonl", "jsonl.zst"])
def test_what_is_refused_does_not_depend_on_the_share(tmp_path: Path, packed: Callable[[bytes], bytes]) -> None:
    """Ten lines in a row without text in one block are; not six at its end and six in the next."""
    path = tmp_path / ("a.jsonl" if packed is bytes else "a.jsonl.zst")
    first, last = b'{"text": "a"}'.ljust(BLOCK - 7) + b"\n", b'{"text": "b"}\n'
    path.write_bytes(packed(first + b"\n" * 12 + last))
    whole = read(path, on_error="stop")
    assert whole == [(0, ["a"], {}), (1, ["b"], {})] == [read(path, (i, 2), on_error="stop")[0] for i in range(2)]
    path.write_bytes(packed(first + b"\n" * 16 + last))
    for share in ((0, 1), (1, 2)):
        with pytest.raises(UserError, match=r"has 10 lines in a row without text before it: refused as a bomb"):
            read(path, share, on_error="stop")


@pytest.mark.usefixtures("small")
def test_nothing_is_lost_between_blocks(tmp_path: Path) -> None:
    for seed in range(25):
        random = Random(seed)
        texts = [str(number) + "x" * random.randrange(60) for number in range(30)]
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        paragraphs = "".join(text + random.choice(["\n", "\n\n", "\n \r\n"]) for text in texts)[: 2 * BLOCK]
        for name, packed in [
            ("a.jsonl", content),
            ("a.jsonl.gz", gzip.compress(content)),
            ("a.jsonl.zst", frames(content)),
        ]:
            (tmp_path / name).write_bytes(packed)
            assert [text for block in check_shares(tmp_path / name) for text in block[1]] == texts
        (tmp_path / "a.txt").write_bytes(paragraphs.encode())
        assert "".join(text for block in check_shares(tmp_path / "a.txt") for text in block[1]) == paragraphs


def test_a_share_reads_the_bytes_of_its_blocks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 1 << 22)
    path = tmp_path / "a.jsonl"
    path.write_bytes((json.dumps({"text": "x" * 1000}) + "\n").encode() * 32_000)
    passed = 0
    contents = lines.Lines._contents

    def counted(self: lines.Lines, file: Any) -> Iterator[bytes]:
        nonlocal passed
        for chunk in contents(self, file):
            passed += len(chunk)
            yield chunk

    monkeypatch.setattr(lines.Lines, "_contents", counted)
    assert [block[0] for block in read(path, (3, 4))] == [3, 7]
    assert passed < 11 << 20  # of 32 MB: two blocks of 4, and less than a chunk on either side of each


CASES: list[tuple[bytes, str, str]] = [
    (b"{broken", "not JSON", r"a\.jsonl:2 is no JSON"),
    (b"[" * 100_000, "not JSON", r"a\.jsonl:2 is no JSON .* nested too deeply"),
    (b'["text"]', "not JSON", r"a\.jsonl:2 is an array"),
    (b'{"text": "\xff"}', "not UTF-8", r"a\.jsonl:2 is no JSON of UTF-8 near b'\\xff'"),
    (b'{"text": "\xed\xa0\x80"}', "not UTF-8", r"a\.jsonl:2 is no JSON of UTF-8"),
    (b'{"content": "x"}', "missing field", r"a\.jsonl:2 has no text in field 'text', only content"),
    (b'{"text": null}', "missing field", r"a\.jsonl:2 has null"),
    (b'{"text": 3}', "not text", r"a\.jsonl:2 has a number"),
    (b'{"text": "' + b"x" * (65 << 20) + b'"}', "too long", r"a\.jsonl:2 has a line of more than 64 MiB"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst"])
@pytest.mark.parametrize(("line", "kind", "message"), CASES, ids=[f"{case[1]} {len(case[0])}" for case in CASES])
def test_a_bad_line_is_counted_by_kind_or_named(
    tmp_path: Path, line: bytes, kind: str, message: str, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    content = b'{"text": "one"}\n' + line + b'\n{"text": "two"}'
    path.write_bytes(content if suffix == "jsonl" else zstandard.compress(content))
    blocks = read(path)
    assert [text for block in blocks for text in block[1]] == ["one", "two"]
    assert [block[2] for block in blocks if block[2]] == [{kind: 1}]
    with pytest.raises(UserError, match=message.replace("jsonl", suffix)):
        read(path, on_error="stop")


def test_what_is_not_wrong_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a\\u0000b"}\r\n\r\n{"text": "\\ud800 \\ud83d\\ude42"}\r\n{"text": "\xef\xbb\xbf"}'
    )
    assert read(path, on_error="stop") == [(0, ["a\0b", "\ufffd 🙂", "\ufeff"], {})]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\0\r\n")
    assert read(path, on_error="stop") == [(0, ["a\0\r\n"], {})]
    for name, content in [
        ("e.jsonl", b""),
        ("e.txt", b""),
        ("e.jsonl.zst", zstandard.compress(b"")),
        ("f.jsonl.gz", b""),
    ]:
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name, on_error="stop") == []


def test_fields_are_nested_and_short_documents_counted(tmp_path: Path) -> None:
    records: list[Any] = [
        {"a": {"b": "nested"}},
        {"a.b": "exact", "a": {"b": "no"}},
        {"a": {"b": "abc"}},
        {"a": {"b": ""}},
        {"a": "x"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    found = read(path, text_field="a.b", least_characters=4)
    assert found == [(0, ["nested", "exact"], {"short": 1, "empty": 1, "missing field": 1})]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst"])
def test_the_rest_of_a_block_of_blank_lines_is_left_out(tmp_path: Path, suffix: str) -> None:
    content = b'{"text": "a"}\n' + b"\n" * 1_000_001 + b'{"text": "b"}\n' + b" " * (15 << 20) + b'\n{"text": "c"}\n'
    (tmp_path / f"a.{suffix}").write_bytes(content if suffix == "jsonl" else zstandard.compress(content))
    assert read(tmp_path / f"a.{suffix}") == [(0, ["a"], {"bomb": 1})]


def test_what_stands_before_the_cut_is_read(tmp_path: Path) -> None:
    """Of one frame of many zstd blocks, all whole ones."""
    texts = [Random(number).randbytes(500).hex() for number in range(1000)]
    packed = zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-100])
    [(_, found, left_out)] = read(tmp_path / "a.jsonl.zst")
    assert found == texts[: len(found)]
    assert len(found) > 800
    assert left_out == {"damaged stream": 1}


def test_text_without_blank_lines_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes((b"one " * 1000 + b"\n") * (17 << 10) + b"\nrest\n")
    found = read(path)
    assert [text for block in found for text in block[1]] == ["rest\n"]
    assert sum(block[2].get("too long", 0) for block in found) == 1
    with pytest.raises(UserError, match=r"a\.txt has more than 64 MiB without a blank line"):
        read(path, on_error="stop")


def test_a_stopped_reader_of_a_later_share_names_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 16)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{bad\n')
    with pytest.raises(UserError, match=r"a\.jsonl, at byte 16, is no JSON"):
        read(tmp_path / "a.jsonl", (1, 2), on_error="stop")


def long_window(content: bytes, log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


def test_long_windows_are_read_up_to_128_mib(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(long_window(b'{"text": "a"}\n', 27))
    assert read(path, on_error="stop") == [(0, ["a"], {})]
    path.write_bytes(zstandard.compress(b'{"text": "a"}\n') + long_window(b'{"text": "b"}\n', 31))
    assert read(path) == [(0, ["a"], {"long window": 1})]
    with pytest.raises(UserError, match=r"a window of 2,048 MiB .* 128 MiB is the most .*; .* zstd --long=27"):
        read(path, on_error="stop")
