"""A build with gigatoken, without it, and with one that gives other ids."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from megallama.corpus.building.build import build_dataset
from megallama.corpus.train_tokenizer import learn_ranks
from megallama.errors import UserError
from megallama.parallel.launch import Launch
from megallama.parallel.spawn import run_ranks
from megallama.text import checked
from megallama.text.checked import CHECKED, CheckedEncoder, checked_encoder
from megallama.text.hf_tokenizer import save_hugging_face
from megallama.text.split_pattern import LLAMA3_PATTERN
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


def test_a_published_tokenizer_json_frames_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It cuts and fills texts and puts a token before each, as Llama's does; with other rules it stays as it is."""
    save_hugging_face(tokenizer, tmp_path)
    file = tmp_path / "tokenizer.json"
    rules = json.loads(file.read_text())
    end = {"id": "<|endoftext|>", "ids": [tokenizer.eod_id], "tokens": ["<|endoftext|>"]}
    template = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    rules["post_processor"] = {
        "type": "TemplateProcessing", "single": template, "pair": [], "special_tokens": {"<|endoftext|>": end}
    }  # fmt: skip
    rules["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(rules))
    framed = load_tokenizer(f"hf:{tmp_path}")
    fast = checked_encoder(framed)
    assert isinstance(fast, CheckedEncoder)
    assert [int(i) for piece in fast.pieces(CODE) for i in piece] == framed.encode(CODE) == tokenizer.encode(CODE)
    words, merges = rules["pre_tokenizer"], rules["model"]["merges"]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    digits = {"type": "Digits", "individual_digits": True}
    older = {"Regex": LLAMA3_PATTERN.replace(r"\s*[\r\n]+", r"\s*[\r\n]")}  # which gigatoken takes for cl100k's
    for other in (
        {"normalizer": {"type": "NFC"}},
        {"model": rules["model"] | {"byte_fallback": True}},
        {"model": rules["model"] | {"merges": merges + merges[:1]}},
        {"pre_tokenizer": words | {"use_regex": False}},
        *(
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": some}}
            for some in (
                [split, words],
                [split, digits, words | {"use_regex": False}],
                [split | {"behavior": "Removed"}, words | {"use_regex": False}],
                [split | {"pattern": older}, words | {"use_regex": False}],
            )
        ),
    ):
        file.write_text(json.dumps(rules | other))
        kept = load_tokenizer(f"hf:{tmp_path}")
        assert checked_encoder(kept) is kept


def test_what_is_no_text_to_a_tokenizer_is_none_to_gigatoken(tmp_path: Path) -> None:
    """Names of special tokens, and entries of a vocabulary that are not in the characters of bytes."""
    ranks = {bytes([i]): i for i in range(256)}
    tokenizer = TiktokenTokenizer("words", ranks, LLAMA3_PATTERN, {"END": 256, "日本": 257}, "END")
    save_hugging_face(tokenizer, tmp_path)
    for some in (tokenizer, load_tokenizer(f"hf:{tmp_path}")):
        fast = checked_encoder(some)
        assert isinstance(fast, CheckedEncoder)
        assert [fast._ids(text).tolist() for text in ("END", "日本")] == [some.encode("END"), some.encode("日本")]


def test_gigatoken_forgets_words(tokenizer: Tokenizer) -> None:
    # In a process of its own: one that has trained keeps what is freed.
    (most,) = run_ranks(most_remembered, 1, tokenizer)
    assert most < 192 << 20


def most_remembered(_: Launch, tokenizer: Tokenizer) -> int:
    """Bytes that a process grows by while it encodes six million words, of which it may remember 16 MiB."""
    checked.MOST_REMEMBERED, checked.CHARACTERS_PER_LOOK = 16 << 20, 200_000
    fast = checked_encoder(tokenizer)
    assert isinstance(fast, CheckedEncoder)
    letters = np.random.default_rng(0).integers(ord("a"), ord("z"), 48_000_000, np.uint8).reshape(-1, 8)
    letters[:, 0] = ord(" ")
    text, before, most = letters.tobytes().decode(), psutil.Process().memory_info().rss, 0
    for begin in range(0, len(text), 200_000):
        fast._ids(text[begin : begin + 200_000])
        most = max(most, psutil.Process().memory_info().rss - before)
    return most


@pytest.mark.parametrize("content", ["import a_library_that_is_not_there", "class Tokenizer: pass"])
def test_a_gigatoken_that_does_not_work_ends_no_build(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "gigatoken").mkdir()
    (tmp_path / "gigatoken" / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "gigatoken", sys)  # so that what is there now comes back
    del sys.modules["gigatoken"]
    assert checked_encoder(tokenizer) is tokenizer
