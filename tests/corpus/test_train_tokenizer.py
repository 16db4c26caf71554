"""Training gives the asked size, the same file every time, and ids that turn back into any text."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallama.corpus.train_tokenizer import learn_ranks, train_tokenizer
from megallama.errors import UserError
from megallama.text.tokenizer import load_tokenizer


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
    imported = "import sys; from megallama.corpus.train_tokenizer import train_tokenizer"
    code = f"{imported}; train_tokenizer([sys.argv[1]], sys.argv[2], 330)"
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
    begin = time.process_time()  # of all threads: what else the machine does is not in it
    tokenizer, _ = train_tokenizer(["stdlib"], str(tmp_path / "tok"), 4096)
    assert time.process_time() - begin < 120
    text = Path(__file__).read_text(encoding="utf-8")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(text) / len(tokenizer.encode(text)) > 2.5


def test_half_a_surrogate_pair_is_learnt_as_it_is_encoded(tmp_path: Path) -> None:
    for name, character in (("half", r"\ud800"), ("replaced", r"\ufffd")):
        (tmp_path / f"{name}.jsonl").write_text(
            '{"text": "a line of words CHARACTER"}\n'.replace("CHARACTER", character) * 9
        )
    half, replaced = (
        train_tokenizer([str(tmp_path / f"{name}.jsonl")], str(tmp_path / name), 262)[0]
        for name in ("half", "replaced")
    )
    assert half.fingerprint == replaced.fingerprint


@pytest.mark.parametrize(
    ("output", "reason"),
    [("file", "Not a directory"), ("file/tok", "Not a directory"), ("/proc/x/y", "No such file or directory")],
)
def test_a_folder_that_cannot_be_made_is_refused(corpus: str, tmp_path: Path, output: str, reason: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=rf"--output .*{output} .*{reason}.*another --output"):
        train_tokenizer([corpus], str(tmp_path / output), 300)
    assert (tmp_path / "file").read_text() == "mine"


def test_no_folder_is_not_the_current_one(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"s3://bucket/tok is a URL, and a tokenizer is saved on a disk"):
        train_tokenizer([corpus], "s3://bucket/tok", 300)
    with pytest.raises(UserError, match=r"--output '' .* --output tokenizer"):
        train_tokenizer([corpus], "", 300)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff", b'{"inputs": 3}'])
def test_a_tokenizer_of_unknown_origin_is_kept_until_force(corpus: str, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "tok"
    train_tokenizer([corpus], str(folder), 300)
    (folder / "training.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tok holds a tokenizer .*--force"):
        train_tokenizer([corpus], str(folder), 300)
    assert load_tokenizer(str(folder)).vocab_size == 300
    assert train_tokenizer([corpus], str(folder), 300, force=True)[1] is False
    assert train_tokenizer([corpus], str(folder), 300)[1] is True
