"""What splits text faster splits it as the published pattern does."""

from __future__ import annotations

import itertools

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from megallama.text.split_pattern import CL100K_PATTERN, LLAMA3_PATTERN, O200K_PATTERN, R50K_PATTERN, automaton_first
from megallama.text.tokenizer import TiktokenTokenizer

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

LONG = st.text(alphabet=st.one_of(st.sampled_from(EVERY_BRANCH + ODD), st.characters()), max_size=60)


@pytest.fixture(scope="module", params=PUBLISHED)
def both(request: pytest.FixtureRequest) -> tuple[tiktoken.Encoding, TiktokenTokenizer]:
    """The published pattern, and ours, over tokens that tell each split of a short text from any other."""
    pattern = PUBLISHED[request.param]
    tokens = dict.fromkeys([bytes([i]) for i in range(256)] + [text.encode() for text in SHORT])
    ranks = {token: rank for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("published", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return theirs, TiktokenTokenizer("ours", ranks, pattern, {"<end>": len(ranks)}, "<end>")


def test_every_short_text_is_split_as_published(both: tuple[tiktoken.Encoding, TiktokenTokenizer]) -> None:
    theirs, ours = both
    assert [text for text in SHORT if theirs.encode_ordinary(text) != ours.encode(text)] == []


@settings(max_examples=1000, deadline=None)
@given(text=LONG)
def test_any_text_is_split_as_published(both: tuple[tiktoken.Encoding, TiktokenTokenizer], text: str) -> None:
    theirs, ours = both
    assert theirs.encode(text, disallowed_special=()) == ours.encode(text)
    assert [int(i) for piece in ours.pieces(text) for i in piece] == ours.encode(text)


@pytest.mark.parametrize("name", ["r50k", "cl100k", "o200k"])
def test_the_patterns_are_those_of_tiktoken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    assert getattr(openai_public, f"{name}_base")()["pat_str"] == PUBLISHED[name]


def test_an_unknown_pattern_stays() -> None:
    assert automaton_first(r"\S+|\s+") == r"\S+|\s+"
    assert all(automaton_first(pattern) != pattern for pattern in PUBLISHED.values())
