"""A build with gigatoken, without it, and with one that gives other ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megallama.corpus.building.build import build_dataset
from megallama.corpus.train_tokenizer import learn_ranks
from megallama.errors import UserError
from megallama.text import checked
from megallama.text.checked import CHECKED, CheckedEncoder, checked_encoder
from megallama.text.tokenizer import TiktokenTokenizer, Tokenizer, load_tokenizer, tokenizer_from_ranks

CODE = Path(__file__).read_text()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    tokenizer_from_ranks(learn_ranks([CODE], 400)).save(tmp_path / "tokenizer")
    return load_tokenizer(str(tmp_path / "tokenizer"))


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    texts = [CODE[begin : begin + 300] for begin in range(2 * CHECKED)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def build(tmp_path: Path, corpus: str, workers: int = 1) -> None:
    build_dataset([corpus], str(tmp_path / "d"), str(tmp_path / "tokenizer"), workers=workers)


def test_a_dataset_does_not_depend_on_gigatoken(
    tokenizer: Tokenizer, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(checked_encoder(tokenizer), CheckedEncoder)
    build(tmp_path, corpus, workers=2)
    built = {suffix: (tmp_path / f"d{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")}
    for suffix in built:
        (tmp_path / f"d{suffix}").unlink()
    monkeypatch.setattr(checked, "find_spec", lambda name: None)
    assert checked_encoder(tokenizer) is tokenizer
    build(tmp_path, corpus)
    assert {suffix: (tmp_path / f"d{suffix}").read_bytes() for suffix in built} == built


def test_other_ids_are_told_and_none_of_them_stays(
    tokenizer: Tokenizer, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = CheckedEncoder._ids
    calls: list[str] = []

    def wrong_from_then_on(self: CheckedEncoder, part: str) -> np.ndarray:
        calls.append(part)
        return encode(self, part)[:: -1 if len(calls) > CHECKED else 1]

    with monkeypatch.context() as patched:
        patched.setattr(CheckedEncoder, "_ids", wrong_from_then_on)
        with pytest.raises(UserError, match=r"gigatoken gives other ids .* pip uninstall gigatoken"):
            build(tmp_path, corpus)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("d")] == []
    build(tmp_path, corpus)


def test_what_gigatoken_cannot_encode_is_told(
    tokenizer: Tokenizer, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    class Broken:
        def encode(self, text: str) -> None:
            raise PanicException("index out of bounds")

    start = CheckedEncoder.__init__

    def start_broken(self: CheckedEncoder, tokenizer: Tokenizer, rules: bytes) -> None:
        start(self, tokenizer, rules)
        self._library = Broken()

    monkeypatch.setattr(CheckedEncoder, "__init__", start_broken)
    with pytest.raises(UserError, match=r"gigatoken cannot encode .*index out of bounds"):
        build(tmp_path, corpus)


def test_a_tokenizer_whose_split_gigatoken_has_not_stays() -> None:
    other = TiktokenTokenizer("other", {bytes([i]): i for i in range(256)}, r"\S+|\s+", {"<e>": 256}, "<e>")
    assert checked_encoder(other) is other
