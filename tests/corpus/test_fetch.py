"""`megallama data fetch` with the real client of the Hugging Face hub, against a server in the hub's shape."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from huggingface_hub import constants
from rich.console import Console

from megallama.corpus.fetching.fetch import fetch, wanted_files
from megallama.corpus.fetching.fetch_progress import FetchProgress
from megallama.errors import UserError
from tests.corpus.hub_serving import Hub, serving_hub
from tests.corpus.serving import Served, serving

pytestmark = pytest.mark.peers

LINES = "".join(json.dumps({"text": f"story {n} {random.Random(n).random()}"}) + "\n" for n in range(3000)).encode()
SHARDS = {f"train/{n:02}.jsonl.zst": zstandard.compress(LINES[: len(LINES) - n]) for n in (0, 1)}
OTHERS = {"README.md": b"# The Pile", "val.jsonl": LINES.splitlines()[0]}


@pytest.fixture
def pile() -> Iterator[Hub]:
    large = {path: Served(content) for path, content in SHARDS.items()}
    with serving_hub(Hub("monology/pile-uncopyrighted", large, OTHERS)) as hub:
        yield hub


def command(hub: Hub, tmp_path: Path, *words: str, **settings: str) -> subprocess.Popen[str]:
    hf = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**hf, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), **settings}
    return subprocess.Popen(
        [sys.executable, "-m", "megallama", "data", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def said(process: subprocess.Popen[str], code: int = 0) -> str:
    output, errors = process.communicate()
    assert process.returncode == code, errors
    return output if code == 0 else errors


def test_a_corpus_by_its_name_is_fetched_and_built(pile: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "pile"
    words = ("fetch", "pile-uncopyrighted", "--output", str(folder))
    pile.large["train/00.jsonl.zst"].cuts = [1000, 0, 2000]
    first = said(command(pile, tmp_path, *words))
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.zst")} == SHARDS
    assert f"{folder}: 2 files" in first
    assert f"next: megallama data build {folder} --output {folder}/corpus --tokenizer gpt2" in first
    assert "2 of them kept" in said(command(pile, tmp_path, *words))
    assert len(pile.resolved) == 2 + 3
    assert "documents" in said(command(pile, tmp_path, "build", str(folder), "--output", str(folder / "corpus")))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_fetch_that_was_ended_continues(pile: Hub, tmp_path: Path, number: signal.Signals) -> None:
    words = ("fetch", "pile-uncopyrighted", "--shards", "1", "--output", str(tmp_path / "pile"))
    served = pile.large["train/00.jsonl.zst"]
    served.gates = [gate := threading.Event()]
    process = command(pile, tmp_path, *words)
    part = tmp_path / "pile" / "train" / "00.jsonl.zst.part"
    served.halfway.wait()
    while not part.exists() or part.stat().st_size == 0:  # the halves are sent, and one is being written
        assert process.poll() is None
    process.send_signal(number)
    errors = process.communicate()[1]
    there = part.stat().st_size
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    assert not part.with_suffix("").exists()
    gate.set()
    said(command(pile, tmp_path, *words))
    assert part.with_suffix("").read_bytes() == SHARDS["train/00.jsonl.zst"]
    assert served.requests == ["", f"bytes={there}-"]


def test_what_the_cache_of_the_hub_has_is_taken_from_there(pile: Hub, tmp_path: Path) -> None:
    fill = "import huggingface_hub as h; h.snapshot_download('monology/pile-uncopyrighted', repo_type='dataset')"
    environment = {**os.environ, "HF_ENDPOINT": pile.url, "HF_HOME": str(tmp_path / "hf")}
    subprocess.run([sys.executable, "-c", fill], env=environment, check=True)
    pile.resolved.clear()
    for folder, settings in (("online", {}), ("offline", {"HF_HUB_OFFLINE": "1"})):
        words = ("fetch", "pile-uncopyrighted", "--output", str(tmp_path / folder))
        assert "2 files" in said(command(pile, tmp_path, *words, **settings))
        assert (tmp_path / folder / "train" / "01.jsonl.zst").read_bytes() == SHARDS["train/01.jsonl.zst"]
    assert pile.resolved == []
    refused = said(command(pile, tmp_path, "fetch", "c4", HF_HUB_OFFLINE="1"), 2)
    assert "allenai/c4 is not in the cache" in refused


def test_a_mistyped_endpoint_is_one_sentence(pile: Hub, tmp_path: Path) -> None:
    refused = said(command(pile, tmp_path, "fetch", "c4", HF_ENDPOINT="http://[x"), 2)
    assert "HF_ENDPOINT=http://[x is no URL" in refused
    assert "Traceback" not in refused


def test_a_build_reads_the_hub_as_it_reads_a_disk(pile: Hub, tmp_path: Path) -> None:
    for name, content in SHARDS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    sources = {"there": "hf://datasets/monology/pile-uncopyrighted/train", "here": str(tmp_path / "train")}
    for name, source in sources.items():
        said(command(pile, tmp_path, "build", source, "--output", str(tmp_path / name), "--workers", "1"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"there{suffix}").read_bytes() == (tmp_path / f"here{suffix}").read_bytes()
    assert pile.resolved[:2] == [*SHARDS]


def test_paths_of_the_hub_and_patterns(pile: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", pile.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{pile.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    base = "hf://datasets/monology/pile-uncopyrighted"
    wanted = {
        (base,): {*SHARDS, "val.jsonl"},
        (f"{base}@main/train",): {*SHARDS},
        (f"{base}/train/*1.jsonl.zst",): {"train/01.jsonl.zst"},
        (f"{base}/val.jsonl",): {"val.jsonl"},
        ("pile-uncopyrighted", "*.md", "val*"): {"README.md", "val.jsonl"},
    }
    for number, ((name, *files), names) in enumerate(wanted.items()):
        folder = tmp_path / str(number)
        fetch(wanted_files(name, files, None, None), folder, FetchProgress(Console(quiet=True)))
        assert set(json.loads((folder / "fetched.json").read_text())) == names
        assert all((folder / name).read_bytes() == {**SHARDS, **OTHERS}[name] for name in names)


def test_what_the_hub_refuses_is_one_sentence(pile: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", pile.url)
    base = "hf://datasets/monology/pile-uncopyrighted"
    refused = {
        "tinystories": "knows no dataset roneneldan/TinyStories",
        f"{base}@v9": "has no revision v9",
        f"{base}/nothing": "holds no nothing",
        f"{base}/nothing/*.txt": "has no nothing/",
        "hf://datasets/one": "names no dataset",
        "pile": "is no corpus that is known: tinystories, pile-uncopyrighted",
    }
    for name, words in refused.items():
        _refuses(name, words)
    pile.token, pile.gated = "mine", True
    _refuses("pile-uncopyrighted", "accepted its terms")
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert len(wanted_files("pile-uncopyrighted", (), None, None)) == 2
    monkeypatch.setenv("HF_TOKEN", "\N{LATIN SMALL LETTER E WITH ACUTE}")
    _refuses("pile-uncopyrighted", "HF_TOKEN are mistyped")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN")
    _refuses("pile-uncopyrighted", "http://127.0.0.1:9 cannot be reached")
    with serving(Served(b"<html>Log in first", kind="text/html")) as portal:
        monkeypatch.setattr(constants, "ENDPOINT", portal.url)
        _refuses("pile-uncopyrighted", "does not answer as the hub does .*: a proxy or a login")


def _refuses(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        wanted_files(name, (), None, None)
