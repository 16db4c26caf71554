"""What splits text faster, in tiktoken and in gigatoken, splits it as the published pattern does."""

from __future__ import annotations

import functools
import itertools
from typing import TypeAlias

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from megallama.text.checked import checked_encoder
from megallama.text.split_pattern import CL100K_PATTERN, LLAMA3_PATTERN, O200K_PATTERN, R50K_PATTERN, automaton_first
from megallama.text.tokenizer import Encoder, TiktokenTokenizer

PUBLISHED = {"r50k": R50K_PATTERN, "llama3": LLAMA3_PATTERN, "cl100k": CL100K_PATTERN, "o200k": O200K_PATTERN}

EVERY_BRANCH = "aAs'1 \n\t!/"
# Titlecase, modifier and other letters, a mark, the long s that `(?i:s)` matches as well, digits that are not 0 to 9,
# the blanks of Unicode, a carriage return, what is no character.
ODD = "lLvers \u01c5\u02b0日\u0301\u017f½٣\u00a0\u2028\u3000\r\n\0🙂\ufffd"
SHORT = [
    "".join(letters)
    for alphabet, longest in ((EVERY_BRANCH, 5), (ODD, 3))
    for length in range(1, longest + 1)
    for letters in itertools.product(alphabet, repeat=length)
]

Both: TypeAlias = tuple[tiktoken.Encoding, TiktokenTokenizer]

LONG = st.text(alphabet=st.one_of(st.sampled_from(EVERY_BRANCH + ODD), st.characters()), max_size=60)


@pytest.fixture(scope="module", params=PUBLISHED)
def both(request: pytest.FixtureRequest) -> Both:
    """The published pattern, and ours, over tokens that tell each split of a short text from any other."""
    pattern = PUBLISHED[request.param]
    tokens = dict.fromkeys([bytes([i]) for i in range(256)] + [text.encode() for text in SHORT])
    ranks = {token: rank for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("published", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return theirs, TiktokenTokenizer("ours", ranks, pattern, {"<end>": len(ranks)}, "<end>")


def test_every_short_text_is_split_as_published(both: Both) -> None:
    theirs, ours = both
    fast = fast_encoder(ours)
    for text in SHORT:
        expected = theirs.encode_ordinary(text)
        assert ours.encode(text) == ids(fast, text) == expected, text


@settings(max_examples=1000, deadline=None)
@given(text=LONG)
def test_any_text_is_split_as_published(both: Both, text: str) -> None:
    theirs, ours = both
    expected = theirs.encode(text, disallowed_special=())
    assert ours.encode(text) == ids(ours, text) == ids(fast_encoder(ours), text) == expected


@pytest.mark.parametrize("name", ["llama3", "o200k"])
def test_every_character_is_of_the_same_class(name: str) -> None:
    """Those that only one of the libraries knows, too: its neighbours and the bytes of a character are tokens."""
    beside = [letter.encode() for letter in "aA1 !'s\n"]
    ranks = {bytes([i]): i for i in range(256)}
    for token in [bytes([i]) + some for i in range(0x80, 0xC0) for some in beside]:
        ranks |= {token: len(ranks)}
    for token in [some + bytes([i]) for i in range(0xC2, 0xF5) for some in beside]:
        ranks |= {token: len(ranks)}
    ours = TiktokenTokenizer("beside", ranks, PUBLISHED[name], {"<end>": len(ranks)}, "<end>")
    theirs = tiktoken.Encoding("beside", pat_str=PUBLISHED[name], mergeable_ranks=ranks, special_tokens={})
    for first in itertools.chain(range(0x80, 0x40000, 64), range(0xE0000, 0xE1000, 64)):
        characters = [chr(code) for code in range(first, first + 64) if not 0xD800 <= code < 0xE000]
        text = "".join(f"a{some}a A{some}A1{some}1!{some}!  {some} \n{some}\n{some}'s" for some in characters)
        assert ids(fast_encoder(ours), text) == theirs.encode_ordinary(text), hex(first)


def ids(encoder: Encoder, text: str) -> list[int]:
    return [int(number) for piece in encoder.pieces(text) for number in piece]


@functools.cache
def fast_encoder(tokenizer: TiktokenTokenizer) -> Encoder:
    return checked_encoder(tokenizer)


@pytest.mark.parametrize("name", ["r50k", "cl100k", "o200k"])
def test_the_patterns_are_those_of_tiktoken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    assert getattr(openai_public, f"{name}_base")()["pat_str"] == PUBLISHED[name]


def test_an_unknown_pattern_stays() -> None:
    assert automaton_first(r"\S+|\s+") == r"\S+|\s+"
    assert all(automaton_first(pattern) != pattern for pattern in PUBLISHED.values())
