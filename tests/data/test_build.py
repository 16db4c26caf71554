"""The dataset depends on the text alone: not on the format, the workers, or a build that was stopped."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import pytest
import zstandard
from rich.console import Console

from megallama.data import build
from megallama.data.build import build_dataset, read_info
from megallama.data.indexed import open_indexed
from megallama.data.tokenizer import load_tokenizer
from megallama.errors import UserError


@pytest.fixture
def formats(tmp_path: Path, documents: list[str]) -> dict[str, str]:
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    (tmp_path / "folder").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "folder" / f"{i:03}.txt").write_bytes(document.encode())
    contents = {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "jsonl.zst": zstandard.compress(lines)}
    for suffix, content in contents.items():
        (tmp_path / f"corpus.{suffix}").write_bytes(content)
    return {suffix: str(tmp_path / f"corpus.{suffix}") for suffix in contents} | {"txt": str(tmp_path / "folder")}


def content(prefix: str) -> tuple[bytes, bytes]:
    return Path(prefix + ".bin").read_bytes(), Path(prefix + ".idx").read_bytes()


def test_formats_and_workers_give_the_same_bytes(
    formats: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BLOCK_CHARACTERS", 200)  # several blocks
    built = {}
    for name, source in formats.items():
        for workers in (1, 3) if name == "jsonl" else (1,):
            prefix = str(tmp_path / f"{name}-{workers}")
            build_dataset([source], prefix, "bytes", workers=workers)
            built[prefix] = content(prefix)
    assert len(built) == 5
    assert len(set(built.values())) == 1
    assert not list(tmp_path.glob("*.parts-*"))
    assert not list(tmp_path.glob("*.tmp"))


def test_documents_come_back_with_their_ends(formats: dict[str, str], documents: list[str], tmp_path: Path) -> None:
    prefix = str(tmp_path / "out" / "d")
    info, _ = build_dataset([formats["jsonl"]], prefix, "bytes", workers=1)
    dataset, tokenizer = open_indexed(prefix), load_tokenizer("bytes")
    found = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert found == [[*tokenizer.encode(document), 256] for document in documents]
    assert info == read_info(prefix)
    assert (info.documents, info.tokens) == (len(documents), len(dataset.tokens))
    assert (info.tokenizer, info.vocab_size, info.eod_id) == ("bytes", 257, 256)
    assert (info.fingerprint, info.sources[0]["source"]) == (tokenizer.fingerprint, formats["jsonl"])


def test_equal_inputs_are_reused_and_others_refused(formats: dict[str, str], tmp_path: Path) -> None:
    prefix = str(tmp_path / "d")
    first, reused = build_dataset([formats["jsonl"]], prefix, "bytes", workers=1)
    assert not reused
    stamp = Path(prefix + ".bin").stat().st_mtime_ns
    assert build_dataset([formats["jsonl"]], prefix, "bytes", workers=2) == (first, True)
    assert Path(prefix + ".bin").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="--force"):
        build_dataset([formats["txt"]], prefix, "bytes", workers=1)
    os.utime(formats["jsonl"], ns=(1, 1))
    with pytest.raises(UserError, match="--force"):
        build_dataset([formats["jsonl"]], prefix, "bytes", workers=1)
    assert build_dataset([formats["txt"]], prefix, "bytes", workers=1, force=True)[1] is False


def test_a_stopped_build_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BLOCK_CHARACTERS", 10)
    source, prefix = tmp_path / "a.jsonl", str(tmp_path / "d")
    good = "".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(10))
    broken = good[:-2] + "\n" + " " * 1
    assert len(broken) == len(good)
    times = (10**18, 10**18)  # the same state for the build, though the last line is broken
    source.write_text(broken)
    os.utime(source, ns=times)
    with pytest.raises(UserError, match=r"a\.jsonl:10"):
        build_dataset([str(source)], prefix, "bytes", workers=1)
    assert not Path(prefix + ".idx").exists()
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("d.parts-*/*.npz")}
    assert len(shards) == 9
    source.write_text(good)
    os.utime(source, ns=times)
    build_dataset([str(source)], prefix, "bytes", workers=1)
    build_dataset([str(source)], str(tmp_path / "whole"), "bytes", workers=1)
    assert content(prefix) == content(str(tmp_path / "whole"))
    assert not list(tmp_path.glob("*.parts-*"))


def test_sources_without_text_are_refused_and_leave_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="hold no text"):
        build_dataset([str(tmp_path / "a.txt")], str(tmp_path / "d"), "bytes", workers=1)
    assert not list(tmp_path.glob("d.[bij]*"))


def test_a_broken_source_leaves_the_standing_dataset(formats: dict[str, str], tmp_path: Path) -> None:
    prefix = str(tmp_path / "d")
    build_dataset([formats["jsonl"]], prefix, "bytes", workers=1)
    before = content(prefix)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        build_dataset([str(tmp_path / "bad.jsonl")], prefix, "bytes", workers=1, force=True)
    assert content(prefix) == before


def test_nothing_is_drawn_where_there_is_no_terminal(formats: dict[str, str], tmp_path: Path) -> None:
    screen = io.StringIO()
    build_dataset([formats["jsonl"]], str(tmp_path / "d"), "bytes", workers=1, console=Console(file=screen))
    assert screen.getvalue() == ""


def test_a_damaged_sidecar_is_refused(formats: dict[str, str], tmp_path: Path) -> None:
    prefix = str(tmp_path / "d")
    build_dataset([formats["jsonl"]], prefix, "bytes", workers=1)
    for content in ("{", "{}", "[]"):
        Path(prefix + ".json").write_text(content)
        with pytest.raises(UserError, match="damaged"):
            read_info(prefix)
