"""Training gives the asked size, the same file every time, and ids that turn back into any text."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallama.data.tokenizer import load_tokenizer
from megallama.data.train_tokenizer import learn_ranks, train_tokenizer
from megallama.errors import UserError


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    text = "".join(f"def function_{i}(self, x):\n    return x + {i}  # naïve café 日本語\n\n" for i in range(300))
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    return str(tmp_path / "corpus.txt")


def test_any_text_survives_and_merges_are_used(corpus: str, tmp_path: Path) -> None:
    tokenizer, _ = train_tokenizer([corpus], str(tmp_path / "tok"), 340)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (340, 339)
    for text in [Path(corpus).read_text(encoding="utf-8"), "🙂\u0000 never seen ÿ\r\n", "<|endoftext|>", "\x80\x9f"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert 339 not in ids
    assert len(tokenizer.encode("def function_1(self, x):")) < 12


def test_the_same_corpus_gives_the_same_file_in_other_processes(corpus: str, tmp_path: Path) -> None:
    code = "import sys; from megallama.data.train_tokenizer import *; train_tokenizer([sys.argv[1]], sys.argv[2], 330)"
    for folder, threads in [("one", "1"), ("two", "4")]:
        environment = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([sys.executable, "-c", code, corpus, str(tmp_path / folder)], env=environment, check=True)
    for name in ("ranks.tiktoken", "megallama_tokenizer.json", "training.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_equal_inputs_are_reused_and_others_refused(corpus: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "tok")
    first, reused = train_tokenizer([corpus], folder, 300)
    assert not reused
    second, reused = train_tokenizer([corpus], folder, 300)
    assert reused
    assert second.fingerprint == first.fingerprint
    with pytest.raises(UserError, match="--force"):
        train_tokenizer([corpus], folder, 301)
    assert train_tokenizer([corpus], folder, 301, force=True)[0].vocab_size == 301
    assert load_tokenizer(folder).vocab_size == 301


@pytest.mark.parametrize(("size", "message"), [(256, "least: 257"), (50_000, r"largest: \d+")])
def test_sizes_that_cannot_be_are_refused(corpus: str, tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer([corpus], str(tmp_path / "tok"), size)
    assert not (tmp_path / "tok").exists()


def test_the_largest_size_named_is_legal(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        train_tokenizer([corpus], str(tmp_path / "tok"), 50_000)
    largest = int(str(refused.value).split("largest: ")[1].split(",")[0])
    assert train_tokenizer([corpus], str(tmp_path / "tok"), largest)[0].vocab_size == largest


def test_bytes_alone_need_no_text() -> None:
    assert learn_ranks([], 256) == {bytes([i]): i for i in range(256)}


def test_4096_entries_on_the_standard_library_take_seconds(tmp_path: Path) -> None:
    begin = time.monotonic()
    tokenizer, _ = train_tokenizer(["stdlib"], str(tmp_path / "tok"), 4096)
    assert time.monotonic() - begin < 60
    text = Path(__file__).read_text(encoding="utf-8")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(text) / len(tokenizer.encode(text)) > 2.5
