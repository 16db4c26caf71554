"""Text from tokens: whole characters, and nothing of a stop string or behind it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, processors

from megallama.generation.load import begin_of_text
from megallama.generation.text import Stripped, TextStream
from megallama.text.tokenizer import ByteTokenizer, TiktokenTokenizer, Tokenizer, tokenizer_from_ranks

TEXT = "naïve 日本語 🙂🏽 e\u0301 \n\t zażółć"
PAIRS = tokenizer_from_ranks({**{bytes([i]): i for i in range(256)}, "日".encode()[:2]: 256, b" \xf0\x9f": 257})


def pieces(tokenizer: Tokenizer, ids: list[int], *stop: str) -> list[str]:
    stream = TextStream(tokenizer, stop)
    found = []
    for token in ids:
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.end()]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), PAIRS], ids=["bytes", "pieces of characters"])
def test_no_piece_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    found = pieces(tokenizer, tokenizer.encode(TEXT * 20))
    assert "".join(found) == TEXT * 20
    assert not any("\ufffd" in piece for piece in found)
    assert sum(map(bool, found)) > 100, "or nothing streams"


@pytest.mark.parametrize("seed", range(20))
def test_broken_bytes_come_out_as_a_whole_decoding_shows_them(seed: int) -> None:
    draws = random.Random(seed)
    ids = [draws.choice([0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x99, 0x82, 0xFF, 65]) for _ in range(200)]
    assert "".join(pieces(ByteTokenizer(), ids)) == ByteTokenizer().decode(ids)


def test_a_model_that_never_ends_a_character_is_not_decoded_from_the_beginning_each_time() -> None:
    lengths: list[int] = []

    class Watched(ByteTokenizer):
        def decode(self, ids: object) -> str:
            lengths.append(len(list(ids)))  # type: ignore[call-overload]
            return super().decode(ids)  # type: ignore[arg-type]

    pieces(Watched(), [0xFF] * 2000)
    assert max(lengths) < 100


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("text", [" \n a  b\t\n c \u00a0\n", "a b", " \n\t  ", ""])
def test_an_answer_in_pieces_is_stripped_as_a_whole_is(text: str, size: int) -> None:
    stripped = Stripped()
    found = [stripped.push(text[place : place + size]) for place in range(0, len(text), size)]
    assert "".join(found) == text.strip()


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("wor",), "hello "),
        (("lo w", "xyz"), "hel"),
        (("world", "ell"), "h"),
        (("hello world!", "rld?"), "hello wo"),
        (("nothing",), "hello world?"),
        (("ld??", "d?!"), "hello world?"),
        (("",), "hello world?"),
        (("lll", "llo"), "he"),
    ],
)
def test_text_ends_before_the_first_stop_string_that_comes(stop: tuple[str, ...], expected: str) -> None:
    ids = ByteTokenizer().encode("hello world?")
    found = pieces(ByteTokenizer(), ids, *stop)
    assert "".join(found) == expected
    for until in range(len(found)):
        assert expected.startswith("".join(found[:until])), "a part of a stop string was given away"


def test_a_stop_string_of_whole_characters_is_found_across_tokens() -> None:
    ids = PAIRS.encode("a 日本 🙂 b")
    assert "".join(pieces(PAIRS, ids, "本 🙂")) == "a 日"


def test_ids_without_a_token_are_named(tmp_path: Path) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 260}
    assert TiktokenTokenizer("gaps", ranks, r"\S+|\s+", {"<e>": 263}, "<e>").unused_ids == {
        256,
        257,
        258,
        259,
        261,
        262,
    }
    assert PAIRS.unused_ids == ByteTokenizer().unused_ids == frozenset()


@pytest.mark.parametrize(("single", "prefix"), [("<s> $A", (1,)), ("$A </s>", ()), ("<s> $A </s>", (1,)), ("$A", ())])
def test_what_begins_a_text_is_what_stands_before_it(tmp_path: Path, single: str, prefix: tuple[int, ...]) -> None:
    library = Library(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, [], unk_token="<unk>"))
    library.post_processor = processors.TemplateProcessing(single, special_tokens=[("<s>", 1), ("</s>", 2)])
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    assert begin_of_text(tmp_path) == prefix
