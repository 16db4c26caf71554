"""The ids that a build writes are those of `encode`, for every kind of tokenizer and any text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from megallama.corpus.train_tokenizer import learn_ranks
from megallama.text import tokenizer as tokenizers
from megallama.text.checked import CheckedEncoder, checked_encoder
from megallama.text.hf_tokenizer import save_hugging_face
from megallama.text.tokenizer import Encoder, load_tokenizer, tokenizer_from_ranks

RANGES = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xD800, 0xDFFF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]


def random_unicode(random: Random, length: int) -> str:
    """Of every width in UTF-8, lone halves of surrogate pairs among it."""
    return "".join(chr(random.randint(*random.choice(RANGES))) for _ in range(length))


def texts() -> list[str]:
    random, code = Random(3), Path(__file__).read_text()
    found = ["", " ", "\0", "\ufeff\r\n", "<|endoftext|><|end_of_text|>", "\ud83d\ude42 \ude42\ud83d", code, code * 20]
    found += [(code[begin:] + code) * 10 for begin in range(8)]
    found += [random_unicode(random, random.randint(1, 400)) for _ in range(100)]
    found += [character * 60_000 for character in "a \n日🙂1!"]
    found += ["ab" * 30_000 + " " * 30_000 + code, "\ud800" * 30_000]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    code = Path(tokenizers.__file__).read_text()
    tokenizer_from_ranks(learn_ranks([code], 400)).save(folder)
    return folder


KINDS: dict[str, Callable[[Path, Path], str]] = {
    "bytes": lambda trained, folder: "bytes",
    "trained": lambda trained, folder: str(trained),
    "hugging face": lambda trained, folder: f"hf:{folder}",
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_ids_of_the_whole(kind: str, trained: Path, tmp_path: Path) -> None:
    save_hugging_face(load_tokenizer(str(trained)), tmp_path)
    tokenizer = load_tokenizer(KINDS[kind](trained, tmp_path))
    fast = checked_encoder(tokenizer)
    assert isinstance(fast, CheckedEncoder) == (kind != "bytes")
    for text in texts():
        expected = tokenizer.encode(text)
        assert_gives(tokenizer, text, expected)
        assert_gives(fast, text, expected)


def assert_gives(encoder: Encoder, text: str, expected: list[int]) -> None:
    pieces = list(encoder.pieces(text))
    assert [int(number) for piece in pieces for number in piece] == expected, text[:40]
    assert all(isinstance(piece, np.ndarray) for piece in pieces)
