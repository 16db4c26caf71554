"""What `megallama data info` says of a dataset is what is in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from megallama.cli import app
from megallama.corpus.building.build import build_dataset
from megallama.corpus.train_tokenizer import train_tokenizer
from megallama.errors import UserError
from megallama.text.tokenizer import load_tokenizer

Write = Callable[..., str]
TEXTS = [f"naïve line {number} of the text, 日本語 🙂\n" * (1 + number % 5) for number in range(60)]


def told(*words: str) -> str:
    result = CliRunner().invoke(app, ["data", "info", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def facts(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(told(*words, "--json"))
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset by a tokenizer that was trained on its text."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    train_tokenizer([str(folder / "a.jsonl")], str(folder / "tokenizer"), 300)
    build_dataset([str(folder / "a.jsonl")], str(folder / "d"), str(folder / "tokenizer"), workers=1)
    return str(folder / "d")


@pytest.mark.parametrize("chunk", [1 << 20, 7])
@pytest.mark.parametrize("fine", [1 << 20, 16])
def test_lengths_are_counted(write_dataset: Write, chunk: int, fine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.data.offsets.CHUNK", chunk)
    monkeypatch.setattr("megallama.corpus.lengths.FINE", fine)
    lengths = [0, 0, 1, 1, 1, *np.random.default_rng(16).integers(1, 200, 90).tolist(), 5000, 70, 5000]
    found = facts(write_dataset("d", [[256 if number % 2 else 1] * length for number, length in enumerate(lengths)]))
    assert (found["documents"], found["tokens"]) == (98, sum(lengths))
    assert found["mean"] == pytest.approx(np.mean(lengths))
    assert found["longest"] == {"document": 95, "tokens": 5000, "share": pytest.approx(5000 / sum(lengths))}
    for share, length in found["quantiles"].items():
        assert length == np.quantile(lengths, float(share), method="inverted_cdf")
    assert found["histogram"][0] == {"at_least": 0, "below": 1, "documents": 2, "tokens": 0}
    for first, second in zip(found["histogram"], found["histogram"][1:], strict=False):
        assert (second["at_least"], second["below"]) == (first["below"], 2 * first["below"])
        within = [length for length in lengths if second["at_least"] <= length < second["below"]]
        assert (second["documents"], second["tokens"]) == (len(within), sum(within))


@pytest.mark.parametrize("chunk", [1 << 20, 2])
def test_documents_without_text_are_counted(write_dataset: Write, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.data.offsets.CHUNK", chunk)
    prefix = write_dataset("d", [[65, 256], [], [256], [65], [256], [256, 256]])
    assert facts(prefix)["empty_documents"] == 1
    assert facts(prefix, "--tokenizer", "bytes")["empty_documents"] == 3


def test_compression_is_that_of_the_text(built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(f"{Path(built).parent}/tokenizer")
    exact = sum(len(text.encode()) for text in TEXTS) / sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert exact > 1.5
    assert facts(built)["bytes_per_token"] == pytest.approx(exact)
    monkeypatch.setattr("megallama.corpus.excerpts.STRETCHES", 16)
    monkeypatch.setattr("megallama.corpus.excerpts.STRETCH_TOKENS", 64)
    found = facts(built)
    assert found["sampled_tokens"] <= 16 * 64 < found["tokens"]
    assert found["bytes_per_token"] == pytest.approx(exact, rel=0.1)


def test_the_first_and_the_last_documents_are_shown(built: str) -> None:
    for count, expected in {0: [], 1: [0], 3: [0, 1, 59], 4: [0, 1, 58, 59], 99: [*range(60)]}.items():
        shown = facts(built, "--documents", str(count))["shown"]
        assert [excerpt["document"] for excerpt in shown] == expected
        for excerpt in shown:
            text = TEXTS[excerpt["document"]] + "<|endoftext|>"
            assert text.startswith(excerpt["text"].rstrip("\ufffd"))
            assert len(excerpt["text"]) > 20
    lines = told(built).splitlines()[-4:]
    assert lines[0].startswith("document 0, ")
    assert "tokens: naïve line 0 of the text, 日本語 🙂\\n<|endoftext|>" in lines[0]
    assert lines[-1].endswith(" ...")


def test_one_document_is_shown_whole_and_reaches_no_terminal_raw(tmp_path: Path) -> None:
    text = "one\n\ttwo \x1b[2J\x07 \u202e three\n" + "x" * 500
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "before"}) + "\n" + json.dumps({"text": text}))
    build_dataset([str(tmp_path / "a.jsonl")], str(tmp_path / "d"), "bytes", workers=1)
    assert facts(f"{tmp_path}/d", "--document", "1")["text"] == text + "<|endoftext|>"
    shown = told(f"{tmp_path}/d", "--document", "1")
    expected = "one\n\ttwo \\x1b[2J\\x07 \\u202e three\n" + "x" * 500 + "<|endoftext|>\n"
    assert shown == f"document 1, {len(text.encode()) + 1} tokens:\n{expected}"
    assert "\x1b" not in told(f"{tmp_path}/d")


def test_a_very_long_document_is_cut(write_dataset: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.corpus.describe.WHOLE_TOKENS", 3)
    prefix = write_dataset("d", [[65] * 10])
    assert told(prefix, "--document", "0", "--tokenizer", "bytes").endswith("tokens:\nAAA\n... and 7 tokens more\n")


def test_of_a_dataset_of_megatron_it_says_what_is_unknown(write_dataset: Write) -> None:
    prefix = write_dataset("d", [[72, 105], [-1 % 1000, 5]])
    text = told(prefix)
    for name in ("tokenizer", "vocab_size", "eod_id", "fingerprint", "text"):
        assert f"{name:12} unknown\n" in text
    assert "The text is unknown: the dataset does not say by which tokenizer it was made; name it with" in text
    assert "document 0, 2 tokens: 72 105\n" in text
    assert "document 0, 2 tokens:\n72 105\n" in told(prefix, "--document", "0")
    with pytest.raises(UserError, match=r"holds the id 999 and the tokenizer has ids 0 to 256; name that of"):
        told(prefix, "--tokenizer", "bytes")
    known = write_dataset("e", [[72, 105, 256]])
    assert facts(known, "--tokenizer", "bytes")["shown"][0]["text"] == "Hi<|endoftext|>"
    assert facts(known, "--tokenizer", "bytes")["vocab_size"] == 257


def test_negative_ids_are_told(tmp_path: Path) -> None:
    (tmp_path / "d.idx").write_bytes(
        b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\2" + np.array([1, 2], "<i8").tobytes()
        + np.array([2], "<i4").tobytes() + np.array([0, 0, 1], "<i8").tobytes()
    )  # fmt: skip
    (tmp_path / "d.bin").write_bytes(b"\x41\xff")
    with pytest.raises(UserError, match="holds the id -1 and the tokenizer has ids 0 to 256"):
        told(f"{tmp_path}/d", "--tokenizer", "bytes")
    assert "A\ufffd" in told(f"{tmp_path}/d", "--tokenizer", "bytes", "--document", "0")


def test_another_tokenizer_and_a_missing_document_are_refused(built: str) -> None:
    with pytest.raises(UserError, match=r"--tokenizer bytes is not the tokenizer of the dataset .*; name .*tokenizer"):
        told(built, "--tokenizer", "bytes")
    with pytest.raises(UserError, match=r"--document 60 is not in the dataset .*; it has documents 0 to 59"):
        told(built, "--document", "60")


def test_counts_need_no_tokenizer(built: str, tmp_path: Path) -> None:
    """Of a dataset whose tokenizer is gone, or is another now; and its file is one of an earlier version."""
    found = json.loads(Path(f"{built}.json").read_text())
    first = ["tokenizer", "fingerprint", "vocab_size", "eod_id", "documents", "tokens", "sources", "inputs"]
    for suffix in (".bin", ".idx"):
        (tmp_path / f"d{suffix}").write_bytes(Path(built + suffix).read_bytes())
    for name, why in {
        "gone/far": "its tokenizer cannot be loaded (",
        "bytes": "bytes is another tokenizer now",
    }.items():
        older = {key: found[key] for key in first} | {"tokenizer": name}
        (tmp_path / "d.json").write_text(json.dumps(older))
        said = facts(f"{tmp_path}/d")
        assert (said["documents"], said["tokenizer"], said["bytes_per_token"]) == (60, name, None)
        assert said["text_unknown"].startswith(why)
        assert why in told(f"{tmp_path}/d")


def test_an_output_that_is_closed_ends_quietly(write_dataset: Write) -> None:
    prefix = write_dataset("d", [[65, 10] * 200_000])
    command = f"{sys.executable} -m megallama data info {prefix} --document 0 --tokenizer bytes | head -2"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("document 0, 400,000 tokens:\nA\n", "")
