"""A dataset in a bucket is the dataset on the disk: copied once for a node, whole, and as it is now."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megallama.data import node_cache
from megallama.data.dataset import TokenDataset
from megallama.errors import UserError
from megallama.evaluation.texts import read_texts
from megallama.system import remote
from megallama.text.tokenizer import load_tokenizer
from tests.launching import arguments, losses, pretrain
from tests.storage import Bucket, new_bucket

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def storage() -> Iterator[Bucket]:
    with new_bucket() as bucket:
        yield bucket


@pytest.fixture
def bucket(storage: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in settings(storage, tmp_path).items():
        monkeypatch.setenv(name, value)
    return storage


def settings(bucket: Bucket, tmp_path: Path) -> dict[str, str]:
    return {**bucket.settings, "MEGALLAMA_CACHE": str(tmp_path / "cache")}


def cached(tmp_path: Path, pattern: str) -> list[Path]:
    return sorted((tmp_path / "cache").rglob(pattern))


def test_a_dataset_in_a_bucket_is_the_one_on_the_disk(bucket: Bucket, byte_dataset: str, tmp_path: Path) -> None:
    there, here = TokenDataset(bucket.put_dataset(byte_dataset, "a/corpus.v1")), TokenDataset(byte_dataset)
    assert np.array_equal(there.indexed.tokens, here.indexed.tokens)
    assert there.fingerprint == here.fingerprint
    assert there.info == here.info
    assert len(cached(tmp_path, "*.bin")) == 1


def test_what_is_evaluated_may_be_a_dataset_or_text_in_a_bucket(bucket: Bucket, byte_dataset: str) -> None:
    tokenizer, text = load_tokenizer("bytes"), Path(byte_dataset).with_name("text.jsonl")
    expected = [text for text in read_texts(byte_dataset, tokenizer) if text.ids]
    for url in (bucket.put_dataset(byte_dataset, "h/corpus"), bucket.put("h/text.jsonl", text.read_bytes())):
        assert [text for text in read_texts(url, tokenizer) if text.ids] == expected


def test_it_is_copied_once_and_again_when_it_was_replaced(
    bucket: Bucket, byte_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    copy = node_cache._copy
    monkeypatch.setattr(node_cache, "_copy", lambda file, target: (copied.append(file.name), copy(file, target)))
    url = bucket.put_dataset(byte_dataset, "b/corpus")
    for _ in range(2):
        TokenDataset(url)
    assert copied == ["corpus.json", "corpus.bin", "corpus.idx"]
    bucket.client.delete_object(Bucket=bucket.name, Key="b/corpus.json")
    assert TokenDataset(url).info is None
    tokens = TokenDataset(byte_dataset).indexed.tokens[::-1]
    bucket.put("b/corpus.bin", tokens.tobytes())  # of the same size
    assert np.array_equal(TokenDataset(url).indexed.tokens, tokens)
    assert copied[3:] == ["corpus.bin", "corpus.idx"] * 2


def test_a_copy_that_lost_a_file_is_mended(bucket: Bucket, byte_dataset: str, tmp_path: Path) -> None:
    url = bucket.put_dataset(byte_dataset, "i/corpus")
    TokenDataset(url)
    (copied,) = cached(tmp_path, "*.bin")
    for damage in (Path.unlink, lambda path: os.truncate(path, 100)):  # by a purge of old files, by a disk
        damage(copied)
        assert np.array_equal(TokenDataset(url).indexed.tokens, TokenDataset(byte_dataset).indexed.tokens)
    bucket.put("i/corpus.bin", b"of another dataset")
    with pytest.raises(UserError, match=rf"{url}, in its copy on this node: .* has 18 bytes and its index promises"):
        TokenDataset(url)


def test_without_a_home_the_folder_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "MEGALLAMA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="HOME is not set; set MEGALLAMA_CACHE"):
        node_cache.cache_folder()


def test_a_copy_that_was_stopped_goes_on_where_it_ended(
    bucket: Bucket, byte_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.put_dataset(byte_dataset, "c/corpus")
    whole = remote.RemoteFile.read
    asked: list[int] = []

    def cut(file: remote.RemoteFile, start: int, end: int) -> bytes:
        asked.append(start)
        if start == 6000 and asked.count(start) == 1:
            raise OSError(5, "the network is gone")
        return whole(file, start, end)

    monkeypatch.setattr(remote.RemoteFile, "read", cut)
    monkeypatch.setattr(node_cache, "_PIECE", 1500)
    with pytest.raises(UserError, match=r"cannot be copied .*the network is gone.*continues"):
        TokenDataset(url)
    assert cached(tmp_path, "*.bin.part")[0].stat().st_size == 6000
    asked.clear()
    monkeypatch.setattr(remote.RemoteFile, "read", lambda *range: asked.append(range[1]) or whole(*range))
    assert np.array_equal(TokenDataset(url).indexed.tokens, TokenDataset(byte_dataset).indexed.tokens)
    assert asked[0] == 6000
    assert cached(tmp_path, "*.part") == []


def test_of_many_processes_one_copies(bucket: Bucket, byte_dataset: str, tmp_path: Path) -> None:
    url = bucket.put_dataset(byte_dataset, "d/corpus")
    script = (
        "import sys; from megallama.data import node_cache; copy = node_cache._copy\n"
        "node_cache._copy = lambda file, target: (print(file.name), copy(file, target))\n"
        "node_cache.on_this_node(sys.argv[1])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, url], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
    assert sorted("".join(said).split()) == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_a_dataset_that_changes_while_it_is_copied_is_refused(
    bucket: Bucket, byte_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.put_dataset(byte_dataset, "e/corpus")
    whole = remote.RemoteFile.read

    def replaced(file: remote.RemoteFile, start: int, end: int) -> bytes:
        if file.suffix == ".bin":
            bucket.put("e/corpus.bin", Path(byte_dataset + ".bin").read_bytes()[::-1])
        return whole(file, start, end)

    monkeypatch.setattr(remote.RemoteFile, "read", replaced)
    with pytest.raises(UserError, match=r"corpus\.bin was replaced while it was copied"):
        TokenDataset(url)
    assert cached(tmp_path, "*.idx") == []


def test_what_cannot_be_is_one_sentence(
    bucket: Bucket, byte_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = bucket.put_dataset(byte_dataset, "f/corpus")
    with pytest.raises(UserError, match=rf"{bucket.name}/f/none\.bin does not exist"):
        TokenDataset(f"s3://{bucket.name}/f/none")
    with pytest.raises(UserError, match=r"needs a package that is not installed .*pip install 'megallama\[remote\]'"):
        TokenDataset("gs://bucket/corpus")
    with pytest.raises(UserError, match=r"github://a/b cannot be copied .*required positional"):
        TokenDataset("github://a/b")
    with pytest.raises(UserError, match=r"megallama data fetch http://host/corpus"):
        TokenDataset("http://host/corpus")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=r"needs 0\.00 GB, and .* has 0\.00 GB free; .*MEGALLAMA_CACHE"):
        TokenDataset(url)


def test_without_the_extra_the_command_says_what_to_install(bucket: Bucket) -> None:
    blocked = "import sys; sys.modules['s3fs'] = None; from megallama.cli import main; main()"
    said = subprocess.run(
        [sys.executable, "-c", blocked, "data", "info", f"s3://{bucket.name}/a"], capture_output=True, text=True
    )
    assert said.returncode == 2
    assert said.stderr.startswith(f"megallama: s3://{bucket.name}/a.json needs a package that is not installed")
    assert said.stderr.endswith("install it with: pip install 'megallama[remote]'\n")
    assert said.stderr.count("\n") == 1


def test_a_run_on_a_bucket_has_the_losses_of_the_disk(bucket: Bucket, byte_dataset: str, tmp_path: Path) -> None:
    url = bucket.put_dataset(byte_dataset, "g/corpus")
    plant = partial(_set, settings(bucket, tmp_path))
    ((code, said),) = pretrain(1, arguments(url, tmp_path / "bucket"), plant=plant)
    assert code == 0
    assert said.startswith(f"megallama: copying {url}, 0.00 GB, to {tmp_path}")
    assert said.count("\n") == 1
    assert pretrain(1, arguments(byte_dataset, tmp_path / "disk"), plant=plant) == [(0, "")]
    assert losses(tmp_path / "bucket") == losses(tmp_path / "disk")
    assert len(losses(tmp_path / "disk")) == 4
    more = ["train.steps=6", "checkpoint.resume=auto"]
    assert pretrain(1, arguments(url, tmp_path / "disk", *more), plant=plant) == [(0, "")]
    assert len(cached(tmp_path, "*.bin")) == 1


def _set(variables: dict[str, str]) -> None:
    os.environ.update(variables)
