"""The dataset depends on the text alone: not on the format, the workers, or a build that was stopped."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard
from rich.console import Console

from megallama.corpus import build
from megallama.corpus.build import build_dataset
from megallama.data.indexed import open_indexed
from megallama.data.info import read_info
from megallama.errors import UserError
from megallama.text.tokenizer import load_tokenizer


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


def test_a_stopped_build_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text changes in between unseen, so it shows which blocks were kept."""
    monkeypatch.setattr(build, "BLOCK_CHARACTERS", 100)
    source, prefix = tmp_path / "a.jsonl", str(tmp_path / "d")
    text = "".join(json.dumps({"text": f"document {i:03} ".ljust(200, "x")}) + "\n" for i in range(100))
    write_unseen(source, text)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file grows longer, as on a full disk
    try:
        with pytest.raises(UserError, match=rf"--output {prefix} .*File too large.*repeat the command"):
            build_dataset([str(source)], prefix, "bytes", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = len(list(tmp_path.glob("d.parts-*/*.npz")))
    assert 0 < kept < 100
    assert not list(tmp_path.glob("d.[bij]*"))
    write_unseen(source, text.replace("document", "DOCUMENT"))
    build_dataset([str(source)], prefix, "bytes", workers=1)
    found = open_indexed(prefix)
    assert [chr(found.document(i)[0]) for i in range(100)] == ["d"] * kept + ["D"] * (100 - kept)
    assert not list(tmp_path.glob("*.parts-*"))


def test_a_damaged_block_of_a_stopped_build_is_told_and_made_again(
    formats: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, command = str(tmp_path / "d"), ([formats["jsonl"]], str(tmp_path / "d"), "bytes")
    with monkeypatch.context() as stopped:
        stopped.setattr(build, "_join", lambda shards, *_: pytest.fail(f"stopped after {next(shards)}"))
        with pytest.raises(pytest.fail.Exception):
            build_dataset(*command, workers=1)
    (shard,) = tmp_path.glob("d.parts-*/*.npz")
    for content in (b"", b"PK", shard.read_bytes()[:-30]):
        shard.parent.mkdir(exist_ok=True)
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"\.npz, which a stopped build left, is damaged .*; repeat the command$"):
            build_dataset(*command, workers=1)
        assert not shard.parent.exists()
    assert build_dataset(*command, workers=1)[0].documents == open_indexed(prefix).num_documents


def write_unseen(source: Path, text: str) -> None:
    """Size and time of the file are those that it had: to a build it is the same."""
    source.write_text(text)
    os.utime(source, ns=(10**18, 10**18))


def test_a_killed_worker_is_explained_and_the_same_command_continues(tmp_path: Path) -> None:
    source, prefix = tmp_path / "a.jsonl", str(tmp_path / "d")
    source.write_text(json.dumps({"text": "x" * build.BLOCK_CHARACTERS}) + "\n")
    source.write_text(source.read_text() * 40)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(build_dataset, [str(source)], prefix, "bytes", workers=2)
        while not list(tmp_path.glob("d.parts-*/*.npz")):
            assert not building.done(), building.result()
            time.sleep(0.01)
        worker = multiprocessing.active_children()[0]
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"worker process .* killed.*memory.* continues.*--workers 1"):
            building.result()
    assert list(tmp_path.glob("d.parts-*/*.npz"))
    assert not Path(prefix + ".idx").exists()
    info, reused = build_dataset([str(source)], prefix, "bytes", workers=2)
    assert (info.documents, reused) == (40, False)
    assert info.tokens == 40 * (build.BLOCK_CHARACTERS + 1) == len(open_indexed(prefix).tokens)
    assert not list(tmp_path.glob("*.parts-*"))


def test_sources_without_text_are_refused_and_leave_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="hold no text"):
        build_dataset([str(tmp_path / "a.txt")], str(tmp_path / "new" / "d"), "bytes", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_broken_source_leaves_the_standing_dataset(formats: dict[str, str], tmp_path: Path) -> None:
    prefix = str(tmp_path / "d")
    build_dataset([formats["jsonl"]], prefix, "bytes", workers=1)
    before = content(prefix)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        build_dataset([str(tmp_path / "bad.jsonl")], prefix, "bytes", workers=1, force=True)
    assert content(prefix) == before


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("good", [0, 9], ids=["first block", "later block"])
def test_a_broken_source_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, good: int
) -> None:
    monkeypatch.setattr(build, "BLOCK_CHARACTERS", 10)
    (tmp_path / "bad.jsonl").write_text('{"text": "a document of a block"}\n' * good + "{")
    with pytest.raises(UserError, match=rf"bad\.jsonl:{good + 1}"):
        build_dataset([str(tmp_path / "bad.jsonl")], str(tmp_path / "d"), "bytes", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("output", "fix"),
    [("", "corpus"), ("out/", "out/corpus"), (".", "./corpus"), ("out/..", "out/../corpus"), ("out//", "out//corpus")],
)
def test_an_output_without_a_name_is_refused(
    formats: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"--output '{output}' .* --output {fix}$"):
        build_dataset([formats["jsonl"]], output, "bytes", workers=1)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("output", "reason"),
    [("file/d", "Not a directory"), ("file/new/d", "Not a directory"), ("/proc/x/y", "No such file or directory")],
)
def test_an_output_that_cannot_be_written_is_refused(
    formats: dict[str, str], tmp_path: Path, output: str, reason: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=rf"--output .*{output} .*{reason}.*another --output"):
        build_dataset([formats["jsonl"]], str(tmp_path / output), "bytes", workers=1)
    assert (tmp_path / "file").read_text() == "mine"


ENCODING = """
def small():
    merges = [b"th", b"the", b" the"]
    return {
        "name": "small",
        "pat_str": r" ?\\p{L}+|\\s+|[^\\s\\p{L}]+",
        "mergeable_ranks": {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)},
        "special_tokens": {"<|endoftext|>": 300},
    }

ENCODING_CONSTRUCTORS = {"small": small}
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_named_encoding_gives_its_ids(tmp_path: Path, workers: str) -> None:
    """The name is registered as tiktoken's plugins are, so nothing is downloaded."""
    (tmp_path / "plugin" / "tiktoken_ext").mkdir(parents=True)
    (tmp_path / "plugin" / "tiktoken_ext" / "testing.py").write_text(ENCODING)
    (tmp_path / "a.jsonl").write_text('{"text": "the then<|endoftext|>"}\n{"text": "in the"}\n')
    prefix = str(tmp_path / "d")
    command = ["data", "build", str(tmp_path / "a.jsonl"), "--output", prefix, "--tokenizer", "small"]
    subprocess.run(
        [sys.executable, "-c", "from megallama.cli import main; main()", *command, "--workers", workers],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "plugin")},
        check=True,
    )
    dataset, info = open_indexed(prefix), read_info(prefix)
    assert dataset.document(0).tolist() == [257, 258, ord("n"), *b"<|endoftext|>", 300]
    assert dataset.document(1).tolist() == [ord("i"), ord("n"), 258, 300]
    assert info is not None
    assert (info.tokenizer, info.vocab_size, info.eod_id, info.documents) == ("small", 301, 300, 2)


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
