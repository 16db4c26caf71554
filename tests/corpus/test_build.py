"""The dataset depends on the text alone: not on the format, the workers, or a build that was stopped."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from rich.console import Console

from megallama.corpus.building import build, recipe
from megallama.corpus.building.build import build_dataset
from megallama.corpus.building.join import join
from megallama.corpus.reading import json_lines
from megallama.corpus.reading.blocks import Reading
from megallama.data.indexed import open_indexed
from megallama.data.info import DatasetInfo, read_info
from megallama.errors import UserError
from megallama.text.rank_file import rank_lines
from megallama.text.tokenizer import Tokenizer, load_tokenizer
from tests.faults.runs import wait_for


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
    monkeypatch.setattr(recipe, "UNIT_BYTES", 200)  # several units of the folder
    built = {}
    for name, source in formats.items():
        for workers in (1, 3) if name == "txt" else (1,):
            prefix = str(tmp_path / f"{name}-{workers}")
            build_dataset([source], prefix, "bytes", workers=workers)
            built[prefix] = content(prefix)
    assert len(built) == 5
    assert len(set(built.values())) == 1
    assert not list(tmp_path.glob("*.parts"))
    assert not list(tmp_path.glob("*.tmp"))


def three_blocks(tmp_path: Path) -> str:
    """A file of three blocks, of 100 documents."""
    lines = (json.dumps({"text": f"{i:03} ".ljust(400_000, "x")}) + "\n" for i in range(100))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress("".join(lines).encode()))
    with (tmp_path / "a.jsonl.zst").open("ab") as file:  # a skippable frame, so that the file is worth sharing
        file.write((0x184D2A50).to_bytes(4, "little") + (2 << 20).to_bytes(4, "little") + bytes(2 << 20))
    return str(tmp_path / "a.jsonl.zst")


def test_workers_share_the_blocks_of_one_file(tmp_path: Path) -> None:
    source, built = three_blocks(tmp_path), []
    for workers in (1, 2, 3):
        prefix = str(tmp_path / f"d-{workers}")
        info, _ = build_dataset([source], prefix, "bytes", workers=workers)
        built.append((*content(prefix), info))
    assert built[0] == built[1] == built[2]
    found = open_indexed(str(tmp_path / "d-3"))
    assert [bytes(found.document(i)[:3].astype("u1")) for i in range(100)] == [b"%03d" % i for i in range(100)]


def test_documents_come_back_with_their_ends(formats: dict[str, str], documents: list[str], tmp_path: Path) -> None:
    prefix = str(tmp_path / "out" / "d")
    info, _ = build_dataset([formats["jsonl"]], prefix, "bytes", workers=1)
    dataset, tokenizer = open_indexed(prefix), load_tokenizer("bytes")
    found = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert found == [[*tokenizer.encode(document), 256] for document in documents]
    assert info == read_info(prefix)
    assert (info.documents, info.tokens) == (len(documents), len(dataset.tokens))
    assert (info.tokenizer, info.vocab_size, info.eod_id) == ("bytes", 257, 256)
    raw = Path(formats["jsonl"]).read_bytes()
    file = {"path": formats["jsonl"], "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert info.sources == [{"source": formats["jsonl"], "bytes": len(raw), "files": [file]}]
    assert info.fingerprint == tokenizer.fingerprint


def test_equal_inputs_are_reused_and_others_refused(formats: dict[str, str], tmp_path: Path) -> None:
    prefix = str(tmp_path / "d")
    first, reused = build_dataset([formats["jsonl"]], prefix, "bytes", workers=1)
    assert not reused
    stamp = Path(prefix + ".bin").stat().st_mtime_ns
    (tmp_path / "d.parts").mkdir()  # of another build, which was killed
    (tmp_path / "d.bin.01234567.tmp").touch()
    assert build_dataset([formats["jsonl"]], prefix, "bytes", workers=2) == (first, True)
    assert {path.name for path in tmp_path.glob("d.*")} == {"d.bin", "d.idx", "d.json"}
    assert Path(prefix + ".bin").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="--force"):
        build_dataset([formats["txt"]], prefix, "bytes", workers=1)
    os.utime(formats["jsonl"], ns=(1, 1))
    with pytest.raises(UserError, match="--force"):
        build_dataset([formats["jsonl"]], prefix, "bytes", workers=1)
    assert build_dataset([formats["txt"]], prefix, "bytes", workers=1, force=True)[1] is False


def test_a_stopped_build_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text changes in between unseen, so it shows which blocks were kept."""
    source, prefix = tmp_path / "a.jsonl", str(tmp_path / "d")
    text = "".join(json.dumps({"text": f"document {i:03} ".ljust(200, "x")}) + "\n" for i in range(100))
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", len(text) // 100)
    write_unseen(source, text)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file grows longer, as on a full disk
    try:
        with pytest.raises(UserError, match=rf"--output {prefix} .*File too large.*repeat the command"):
            build_dataset([str(source)], prefix, "bytes", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = len(list(tmp_path.glob("d.parts/*.shard")))
    assert 0 < kept < 100
    assert not list(tmp_path.glob("d.[bij]*"))
    write_unseen(source, text.replace("document", "DOCUMENT"))
    build_dataset([str(source)], prefix, "bytes", workers=1)
    found = open_indexed(prefix)
    assert [chr(found.document(i)[0]) for i in range(100)] == ["d"] * kept + ["D"] * (100 - kept)
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda whole: whole[:-30], lambda whole: whole[30:], lambda _: b"x" * 99]
)
def test_a_damaged_block_of_a_stopped_build_is_made_again(
    formats: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    build_dataset([formats["jsonl"]], str(tmp_path / "whole"), "bytes", workers=1)
    prefix, command = str(tmp_path / "d"), ([formats["jsonl"]], str(tmp_path / "d"), "bytes")
    with monkeypatch.context() as stopped:
        stopped.setattr(build, "join", lambda shards, *_: pytest.fail(f"stopped after {next(shards())}"))
        with pytest.raises(pytest.fail.Exception):
            build_dataset(*command, workers=1)
    (shard,) = tmp_path.glob("d.parts/*.shard")
    (tmp_path / "d.parts" / f"{shard.stem} (copy).shard").touch()
    shard.write_bytes(damage(shard.read_bytes()))
    build_dataset(*command, workers=1)
    assert content(prefix) == content(str(tmp_path / "whole"))


def write_unseen(source: Path, text: str) -> None:
    """Size and time of the file are those that it had: to a build it is the same."""
    source.write_text(text)
    os.utime(source, ns=(10**18, 10**18))


def test_a_killed_worker_is_explained_and_the_same_command_continues(tmp_path: Path) -> None:
    source, prefix = three_blocks(tmp_path), str(tmp_path / "d")
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(build_dataset, [source], prefix, "bytes", workers=2)
        wait_for(lambda: list(tmp_path.glob("d.parts/*.shard*")) or building.done())
        assert not building.done(), building.result()
        workers = multiprocessing.active_children()
        worker = workers[0]
        assert worker.pid is not None
        threads = [len(os.listdir(f"/proc/{each.pid}/task")) for each in workers]
        assert max(threads) == 2, "one works, one waits for the end of the parent"
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"worker process .* killed.*memory.* continues.*--workers 1"):
            building.result()
    assert not Path(prefix + ".idx").exists()
    info, reused = build_dataset([source], prefix, "bytes", workers=2)
    assert (info.documents, reused) == (100, False)
    assert info.tokens == 100 * 400_001 == len(open_indexed(prefix).tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.zst", "d.bin", "d.idx", "d.json"]


def test_workers_tokenise_as_the_build_does_whatever_becomes_of_the_file(
    formats: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = tmp_path / "ranks"
    ranks.write_bytes(rank_lines({bytes([255 - i]): i for i in range(256)} | {b"th": 256}))
    build_dataset([formats["txt"]], str(tmp_path / "one"), str(ranks), workers=1)

    def make_recipe(*arguments: Any, **rules: bool) -> tuple[recipe.Recipe, Tokenizer]:
        found = recipe.make_recipe(*arguments, **rules)
        ranks.write_bytes(rank_lines({bytes([i]): i for i in range(256)} | {b"th": 256}))
        return found

    monkeypatch.setattr(build, "make_recipe", make_recipe)
    monkeypatch.setattr(recipe, "UNIT_BYTES", 200)
    build_dataset([formats["txt"]], str(tmp_path / "two"), str(ranks), workers=2)
    assert content(str(tmp_path / "two")) == content(str(tmp_path / "one"))


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


def test_a_source_broken_at_once_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        build_dataset([str(tmp_path / "bad.jsonl")], str(tmp_path / "d"), "bytes", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_source_loses_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, documents: list[str]
) -> None:
    """Once it is mended, or told to be skipped, what was tokenised before is found again."""
    monkeypatch.setattr(recipe, "UNIT_BYTES", 0)  # a unit for each file
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_unseen(good, '{"text": "good"}\n' * 9)
    bad.write_text('{"text": "fine"}\n{"text": 5}\n{"text": ""}\n{"text": "also fine"}\n')
    command, prefix = ([str(good), str(bad)], str(tmp_path / "d"), "bytes"), str(tmp_path / "d")
    with pytest.raises(UserError, match=r"b\.jsonl:2 has a number in field 'text'"):
        build_dataset(*command, workers=workers)
    assert {path.name for path in tmp_path.iterdir()} - {"d.parts"} == {"a.jsonl", "b.jsonl"}
    write_unseen(good, '{"text": "GOOD"}\n' * 9)
    info, _ = build_dataset(*command, workers=1, reading=Reading(on_error="skip"))
    assert (info.documents, info.left_out) == (11, {"empty": 1, "not text": 1})
    assert info.rules == {"text_field": "text", "min_length": 1, "on_error": "skip", "deduplicate": False}
    assert chr(open_indexed(prefix).document(0)[0]) == (
        "g" if workers == 1 else chr(open_indexed(prefix).document(0)[0])
    )
    assert not (tmp_path / "d.parts").exists()


def test_a_command_that_fails_at_once_leaves_what_another_has_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "UNIT_BYTES", 0)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": 5}\n')
    command = ([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], str(tmp_path / "d"), "bytes")
    for field, refusal in (("text", r"b\.jsonl:1 has a number"), ("tetx", r"a\.jsonl:1 has no text in field 'tetx'")):
        with pytest.raises(UserError, match=refusal):
            build_dataset(*command, workers=1, reading=Reading(field))
        assert len(list(tmp_path.glob("d.parts/*.shard"))) == 1


def test_a_block_with_skipped_documents_is_not_taken_where_errors_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n')
    command = ([str(tmp_path / "b.jsonl")], str(tmp_path / "d"), "bytes")
    with monkeypatch.context() as stopped:
        stopped.setattr(build, "join", lambda shards, *_: pytest.fail(f"stopped after {next(shards())}"))
        with pytest.raises(pytest.fail.Exception):
            build_dataset(*command, workers=1, reading=Reading(on_error="skip"))
    assert list(tmp_path.glob("d.parts/*.shard"))
    with pytest.raises(UserError, match=r"b\.jsonl:2 has a number"):
        build_dataset(*command, workers=1)


def test_short_documents_are_left_out_and_counted(
    formats: dict[str, str], tmp_path: Path, documents: list[str]
) -> None:
    info, _ = build_dataset([formats["txt"]], str(tmp_path / "d"), "bytes", reading=Reading(least_characters=34))
    long = sum(len(document) >= 34 for document in documents)
    assert 0 < long < len(documents)
    assert (info.documents, info.left_out) == (long, {"short": len(documents) - long})


def test_a_source_that_changes_while_it_is_read_is_refused(
    formats: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(formats["jsonl"])

    def touched(*arguments: object) -> DatasetInfo:
        os.utime(source, ns=(1, 1))
        return join(*arguments)

    monkeypatch.setattr(build, "join", touched)
    with pytest.raises(UserError, match=r"corpus\.jsonl was changed while it was read; repeat the command"):
        build_dataset([str(source)], str(tmp_path / "d"), "bytes", workers=1)
    assert not list(tmp_path.glob("d.[bij]*"))


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
    lines = '{"text": "the then<|endoftext|>"}\n{"text": "in the"}\n'
    (tmp_path / "a.jsonl").write_text(lines + " " * (1 << 20))  # worth a second worker
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


def test_a_sidecar_of_an_earlier_version_is_read(formats: dict[str, str], tmp_path: Path) -> None:
    prefix = str(tmp_path / "d")
    info, _ = build_dataset([formats["jsonl"]], prefix, "bytes", workers=1)
    earlier = {key: value for key, value in asdict(info).items() if key not in ("left_out", "rules")}
    Path(prefix + ".json").write_text(json.dumps(earlier))
    assert read_info(prefix) == replace(info, left_out={}, rules={})
