"""Text in a bucket gives the dataset that the same text on a disk gives, also one that is put into the bucket."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow.parquet
import pytest
import zstandard
from typer.testing import CliRunner

from megallama.cli import app
from megallama.corpus.building.build import build_dataset
from megallama.corpus.fetching import upload
from megallama.corpus.fetching.upload import local_output
from megallama.corpus.reading.blocks import Reading, read_blocks
from megallama.corpus.reading.corpora import source_files
from megallama.errors import UserError
from megallama.system import remote
from megallama.system.remote import open_source_file, remote_file
from tests.storage import Bucket, new_bucket

pytestmark = pytest.mark.peers

LINES = [json.dumps({"text": f"document {n} of {random.Random(n).random()}"}) + "\n" for n in range(2000)]
TEXT = "".join(LINES).encode()


def parquet(rows: int) -> bytes:
    file = io.BytesIO()
    texts = [f"row {n} of {random.Random(n).random()}" for n in range(rows)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=500)
    return file.getvalue()


FILES = {
    "a.jsonl": TEXT,
    "deep/b.jsonl.zst": zstandard.compress(TEXT),
    "deep/c.jsonl.gz": gzip.compress(TEXT),
    "f.parquet": parquet(2000),
    "d.txt": b"some words\n\n" * 200,
    "e.pdf": b"%PDF",
}


@pytest.fixture(scope="module")
def storage() -> Iterator[Bucket]:
    with new_bucket() as bucket:
        for name, content in FILES.items():
            bucket.put(f"text/{name}", content)
        yield bucket


@pytest.fixture
def bucket(storage: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in {**storage.settings, "MEGALLAMA_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    for name, content in FILES.items():
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_bytes(content)
    return storage


def made(prefix: str) -> tuple[bytes, bytes]:
    return Path(prefix + ".bin").read_bytes(), Path(prefix + ".idx").read_bytes()


@pytest.mark.parametrize("path", ["text", "text/deep/b.jsonl.zst", "text/d.txt", "text/f.parquet"])
def test_text_in_a_bucket_is_that_on_the_disk(bucket: Bucket, tmp_path: Path, path: str) -> None:
    for name, source in (("there", f"s3://{bucket.name}/{path}"), ("here", str(tmp_path / path))):
        build_dataset([source], str(tmp_path / name), "bytes", workers=1)
    assert made(str(tmp_path / "there")) == made(str(tmp_path / "here"))
    assert build_dataset([f"s3://{bucket.name}/{path}"], str(tmp_path / "there"), "bytes", workers=1)[1]


def test_a_changed_object_is_another_source(bucket: Bucket, tmp_path: Path) -> None:
    url = bucket.put("other/a.jsonl", TEXT)
    build_dataset([url], str(tmp_path / "a"), "bytes", workers=1)
    bucket.put("other/a.jsonl", TEXT.replace(b"document 7 ", b"document 8 "))
    with pytest.raises(UserError, match=r"made from other sources"):
        build_dataset([url], str(tmp_path / "a"), "bytes", workers=1)


def test_folders_patterns_and_what_is_not_there(bucket: Bucket) -> None:
    base = f"s3://{bucket.name}/text"
    named = {
        url: [str(path).removeprefix(f"{base}/") for path in source_files(url)] for url in (base, f"{base}/**/*.gz")
    }
    assert named == {
        base: ["a.jsonl", "d.txt", "deep/b.jsonl.zst", "deep/c.jsonl.gz", "f.parquet"],
        f"{base}/**/*.gz": ["deep/c.jsonl.gz"],
    }
    for url in (f"{base}/none", f"{base}/*.none", f"{base}/e.pdf"):
        with pytest.raises(UserError, match=r"holds no \.txt"):
            source_files(url)


@pytest.mark.parametrize("name", ["a.jsonl", "deep/b.jsonl.zst", "f.parquet"])
def test_a_storage_that_fails_is_no_damaged_file(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = remote_file(f"s3://{bucket.name}/text/{name}")
    monkeypatch.setattr(remote, "READ_AHEAD", 4096)
    read, reads = remote.RemoteFile.read, iter(range(100))

    def failing(file: remote.RemoteFile, start: int, end: int) -> bytes:
        if next(reads) == 2:
            raise OSError(5, "the network is gone")
        return read(file, start, end)

    monkeypatch.setattr(remote.RemoteFile, "read", failing)
    blocks = read_blocks(path, Reading(on_error="skip"))
    with pytest.raises(UserError, match=rf"{name} cannot be read any further \(the network is gone\)"):
        list(chain.from_iterable(block.documents for block in blocks))


def test_a_remote_file_is_read_as_a_local_one_in_bounded_pieces(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "READ_AHEAD", 10_000)
    url = bucket.put("large/a.jsonl", TEXT)
    pieces: list[int] = []
    read = remote.RemoteFile.read
    monkeypatch.setattr(remote.RemoteFile, "read", lambda *range: pieces.append(range[2] - range[1]) or read(*range))
    with open_source_file(remote_file(url)) as there, (tmp_path / "text" / "a.jsonl").open("rb") as here:
        for offset, whence, size in ((0, 0, 10), (-100, 2, 200), (50_000, 0, 30_000), (-20_000, 1, 5), (1, 1, -1)):
            assert there.seek(offset, whence) == here.seek(offset, whence)
            assert there.read(size) == here.read(size)
            assert there.tell() == here.tell()
        assert isinstance(there, io.BufferedReader)
    assert 0 < max(pieces) <= 10_000


def test_a_dataset_is_put_into_a_bucket_whole_and_once(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, order = f"s3://{bucket.name}/made/corpus", list[str]()
    put = upload.upload
    monkeypatch.setattr(upload, "upload", lambda path, target: (order.append(path.suffix), put(path, target)))
    build_dataset([str(tmp_path / "text")], str(tmp_path / "here"), "bytes", workers=1)
    with local_output(url, force=False) as prefix:
        build_dataset([str(tmp_path / "text")], prefix, "bytes", workers=1)
        assert not [name for name in bucket.content() if name.startswith("made/")]
    stored = bucket.content()
    assert (stored["made/corpus.bin"], stored["made/corpus.idx"]) == made(str(tmp_path / "here"))
    assert order == [".bin", ".json", ".idx"]
    assert list((tmp_path / "cache" / "builds").iterdir()) == []
    with pytest.raises(UserError, match=r"made/corpus\.idx exists; add --force"), local_output(url, force=False):
        raise AssertionError
    with local_output(url, force=True) as prefix:
        build_dataset([str(tmp_path / "text" / "d.txt")], prefix, "bytes", workers=1)
    assert len(bucket.content()["made/corpus.bin"]) == 2 * (200 * 12 + 1)


def test_a_dataset_that_came_meanwhile_is_not_replaced(bucket: Bucket) -> None:
    late = local_output(f"s3://{bucket.name}/late/corpus", force=False)
    late.__enter__()
    bucket.put("late/corpus.idx", b"of another node")
    with pytest.raises(UserError, match=r"late/corpus\.idx exists"):
        late.__exit__(None, None, None)
    assert bucket.content()["late/corpus.idx"] == b"of another node"


def test_a_bucket_that_refuses_leaves_what_was_built(bucket: Bucket, tmp_path: Path) -> None:
    url = "s3://there-is-no-such-bucket/corpus"
    with (
        pytest.raises(UserError, match=r"cannot be uploaded to .*repeat the command"),
        local_output(url, force=False) as at,
    ):
        build_dataset([str(tmp_path / "text")], at, "bytes", workers=1)
    assert len(list((tmp_path / "cache" / "builds").rglob("corpus.bin"))) == 1


@pytest.mark.parametrize("words", [["build", "stdlib", "--part", "1/2", "--output"], ["merge"]])
def test_parts_are_not_made_in_a_bucket(words: list[str]) -> None:
    refused = CliRunner().invoke(app, ["data", *words, "s3://bucket/corpus"])
    assert "s3://bucket/corpus is a URL, and parts are built and merged on a disk" in str(refused.exception)


def test_the_command_reads_from_and_writes_to_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    base = f"s3://{bucket.name}"
    build = ["data", "build", f"{base}/text", "--output", f"{base}/by/corpus", "--workers", "2"]
    assert CliRunner().invoke(app, build).stdout.startswith(f"{base}/by/corpus: 8,001 documents, ")
    info = CliRunner().invoke(app, ["data", "info", f"{base}/by/corpus", "--json"]).stdout
    assert json.loads(info)["documents"] == 8001
