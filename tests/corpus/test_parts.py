"""Parts that are built apart, merged, are the dataset of one build; what is not all of them is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import zstandard
from typer.testing import CliRunner

from megallama.cli import app
from megallama.corpus.building import build, merge, recipe
from megallama.corpus.building.build import build_dataset, build_part
from megallama.corpus.building.merge import merge_parts
from megallama.corpus.building.workers import Here
from megallama.corpus.reading import json_lines
from megallama.corpus.reading.blocks import Reading
from megallama.errors import UserError


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A file of some blocks, which parts share, small ones, one of them twice, and an empty one."""
    monkeypatch.setattr(recipe, "UNIT_BYTES", 300)
    monkeypatch.setattr(recipe, "SHARE_BYTES", 1)
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 1000)
    lines = (json.dumps({"text": f"{i:03} {Random(i).randbytes(30).hex()}"}) + "\n" for i in range(100))
    (tmp_path / "large.jsonl.zst").write_bytes(zstandard.compress("".join(lines).encode()))
    (tmp_path / "small").mkdir()
    for i in range(9):
        (tmp_path / "small" / f"{i}.txt").write_text(f"text {i} " * 5 * i)
    small = str(tmp_path / "small")
    return [small, str(tmp_path / "large.jsonl.zst"), small]


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]


def build_parts(sources: list[str], prefix: Path, count: int, **options: bool) -> None:
    for i in reversed(range(count)):
        build_part(sources, str(prefix), "bytes", (i, count), workers=1, **options)


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_merged_parts_are_the_bytes_of_one_build(
    sources: list[str], tmp_path: Path, count: int, deduplicate: bool
) -> None:
    whole, prefix = tmp_path / "whole", tmp_path / "d"
    build_dataset(sources, str(whole), "bytes", workers=1, deduplicate=deduplicate)
    build_parts(sources, prefix, count, deduplicate=deduplicate)
    assert len(list(tmp_path.glob("d.part-*"))) == count
    info, reused = merge_parts(str(prefix))
    assert content(prefix) == content(whole)
    assert (info.documents, reused) == (100 + 8 * (2 - deduplicate), False)
    assert info.left_out == ({"duplicate": 8} if deduplicate else {})
    assert not list(tmp_path.glob("*.part*"))
    assert merge_parts(str(prefix)) == (info, True)
    assert build_dataset(sources, str(prefix), "bytes", deduplicate=deduplicate) == (info, True)


def test_workers_share_the_blocks_of_a_part(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other in this process, where the blocks are small."""
    build_dataset(sources, str(tmp_path / "whole"), "bytes", workers=1)
    monkeypatch.setattr(build, "Workers", lambda *team: Here(*team[:3]))
    for part in range(2):
        build_part(sources, str(tmp_path / "d"), "bytes", (part, 2), workers=3)
    merge_parts(str(tmp_path / "d"))
    assert content(tmp_path / "d") == content(tmp_path / "whole")


def test_every_part_has_something_to_do(sources: list[str], tmp_path: Path) -> None:
    build_parts(sources, tmp_path / "d", 3)
    documents = [json.loads((tmp_path / f"d.part-{i}-of-3/part.json").read_text())["documents"] for i in (1, 2, 3)]
    assert min(documents) > 15


def test_a_finished_part_is_kept(sources: list[str], tmp_path: Path) -> None:
    arguments = (sources, str(tmp_path / "d"), "bytes", (0, 2))
    first = build_part(*arguments, workers=1)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "d.part-1-of-2").iterdir()}
    assert build_part(*arguments, workers=1) == (*first[:2], True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d.part-1-of-2").iterdir()} == stamps
    with pytest.raises(UserError, match=r"d\.part-1-of-2 was made .* other rules; add --force"):
        build_part(*arguments, workers=1, reading=Reading(least_characters=7))
    assert build_part(*arguments, workers=1, reading=Reading(least_characters=7), force=True)[2] is False


def test_a_part_that_is_forced_is_read_anew(tmp_path: Path) -> None:
    """Size and time of the file may be those that it had."""
    source, arguments = tmp_path / "a.jsonl", ([str(tmp_path / "a.jsonl")], str(tmp_path / "d"), "bytes", (0, 1))
    for text in ("old", "new"):
        source.write_text(json.dumps({"text": text}))
        os.utime(source, ns=(1, 1))
        build_part(*arguments, workers=1, force=text == "new")
    merge_parts(str(tmp_path / "d"))
    assert (tmp_path / "d.bin").read_bytes()[::2] == b"new\0"


def cut_a_shard(tmp_path: Path) -> None:
    shard = max((tmp_path / "d.part-3-of-3").glob("*.shard"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda at: shutil.rmtree(at / "d.part-2-of-3"), r"d lacks d\.part-2-of-3; build it first$"),
    "all but one missing": (
        lambda at: [shutil.rmtree(at / f"d.part-{i}-of-3") for i in (1, 2)],
        r"d lacks d\.part-1-of-3, d\.part-2-of-3; build them first$",
    ),
    "all missing": (
        lambda at: [shutil.rmtree(at / f"d.part-{i}-of-3") for i in (1, 2, 3)],
        r"there are no parts .*/d\.",
    ),
    "unfinished": (lambda at: (at / "d.part-2-of-3/part.json").unlink(), r"part .*part-2-of-3 is not finished; repeat"),
    "doubled": (
        lambda at: shutil.copytree(at / "d.part-1-of-3", at / "d.part-2-of-3", dirs_exist_ok=True),
        r"part .*d\.part-2-of-3 is a copy of .*d\.part-1-of-3; remove it",
    ),
    "of other parts": (
        lambda at: build_part([str(at / "small")] * 2, str(at / "d"), "bytes", (1, 2), workers=1),
        r"part .* was made from other sources.* than .*; build it again, or remove it$",
    ),
    "of another number": (
        lambda at: build_part(
            [str(at / "small"), str(at / "large.jsonl.zst"), str(at / "small")],
            str(at / "d"),
            "bytes",
            (1, 4),
            workers=1,
        ),
        r"d has parts of 3 and of 4; remove those that are too many$",
    ),
    "a shard cut short": (cut_a_shard, r"part .*d\.part-3-of-3 is damaged: .*; build it again with --force$"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_all_parts_of_one_dataset_is_refused(sources: list[str], tmp_path: Path, fault: str) -> None:
    build_parts(sources, tmp_path / "d", 3)
    make, sentence = FAULTS[fault]
    make(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=sentence) as refused:
        merge_parts(str(tmp_path / "d"))
    assert "\n" not in str(refused.value)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_damaged_part_is_mended_by_the_advice(sources: list[str], tmp_path: Path) -> None:
    build_dataset(sources, str(tmp_path / "whole"), "bytes", workers=1)
    build_parts(sources, tmp_path / "d", 3)
    cut_a_shard(tmp_path)
    build_part(sources, str(tmp_path / "d"), "bytes", (2, 3), workers=1, force=True)
    merge_parts(str(tmp_path / "d"))
    assert content(tmp_path / "d") == content(tmp_path / "whole")


def test_a_merge_stopped_while_it_removes_the_parts_is_repeated(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_parts(sources, tmp_path / "d", 2)
    with monkeypatch.context() as stopped:
        stopped.setattr(merge, "_remove", lambda folders: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            merge_parts(str(tmp_path / "d"))
    before = content(tmp_path / "d")
    for path in (tmp_path / "d.part-1-of-2").glob("*.shard"):
        path.unlink()
    assert merge_parts(str(tmp_path / "d"))[1] is True
    assert content(tmp_path / "d") == before
    assert not list(tmp_path.glob("*.part*"))


def test_another_dataset_is_replaced_by_force_only(sources: list[str], tmp_path: Path) -> None:
    build_dataset([sources[0]], str(tmp_path / "d"), "bytes", workers=1)
    before = content(tmp_path / "d")
    build_parts(sources, tmp_path / "d", 2)
    with pytest.raises(UserError, match=r"d\.bin was made from other sources.*--force"):
        merge_parts(str(tmp_path / "d"))
    assert content(tmp_path / "d") == before
    assert merge_parts(str(tmp_path / "d"), force=True)[0].documents == 116


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/", "a/b", "-1/2", "1/2/3", ""])
def test_what_is_no_part_is_refused(tmp_path: Path, part: str) -> None:
    words = ["data", "build", "stdlib", "--output", str(tmp_path / "d"), f"--part={part}"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UserError)
    assert f"--part {part} is no part; the first of four is --part 1/4" in str(result.exception)


def test_the_commands_build_and_merge(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "one"}\n[]\n')
    prefix = str(tmp_path / "d")
    rules = ["--deduplicate", "--on-error", "skip", "--min-length", "2", "--workers", "1"]
    for part in ("1/2", "2/2"):
        words = ["data", "build", str(tmp_path / "a.jsonl"), "--output", prefix, *rules, "--part", part]
        said = CliRunner().invoke(app, words, catch_exceptions=False).stdout
        assert said.startswith(f"{prefix}.part-{part[0]}-of-2: ")
    said = CliRunner().invoke(app, ["data", "merge", prefix], catch_exceptions=False).stdout
    assert said == f"{prefix}: 2 documents, 8 tokens, merged\nleft out: 1 duplicate, 1 not JSON\n"
