"""Ranks as a byte-level BPE: merges that give tiktoken's ids, patterns in the library's own dialect, and refusals."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from megallama.errors import UserError
from megallama.text.byte_level import merges_of, oniguruma
from megallama.text.hf_tokenizer import save_hugging_face
from megallama.text.split_pattern import CL100K_PATTERN, LLAMA3_PATTERN, R50K_PATTERN
from megallama.text.tokenizer import ByteTokenizer, TiktokenTokenizer, Tokenizer, load_tokenizer, tokenizer_from_ranks

BYTES = {bytes([i]): i for i in range(256)}


def of_pattern(pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> Tokenizer:
    return TiktokenTokenizer("x", ranks, pattern, special_tokens, next(iter(special_tokens)))


def reread(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    save_hugging_face(tokenizer, folder)
    return load_tokenizer(f"hf:{folder}")


def random_ranks(alphabet: bytes, count: int, seed: int) -> dict[bytes, int]:
    """Tokens that no training would give: many can be joined in several ways, and some in none."""
    rng = random.Random(seed)
    ranks = dict(BYTES)
    while len(ranks) < 256 + count:
        ranks.setdefault(bytes(rng.choices(alphabet, k=rng.randint(2, 7))), len(ranks))
    return ranks


def test_parts_of_tokens_are_those_that_tiktoken_joins() -> None:
    ranks = BYTES | {b"bc": 256, b"ab": 257, b"abc": 258, b"aabc": 259, b"xyz": 260}
    # bc comes before ab, so abc is of a and bc; xyz is a token only where it is a whole piece of text.
    assert merges_of(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"a", b"abc")]


@pytest.mark.parametrize("seed", range(6))
def test_ranks_of_any_kind_give_the_same_ids(seed: int, tmp_path: Path) -> None:
    ours = tokenizer_from_ranks(random_ranks(b"ab "[: 2 + seed % 2], 150, seed))
    theirs = reread(ours, tmp_path)
    rng = random.Random(seed)
    texts = ["".join(rng.choices("aaab ", k=rng.randint(1, 300))) for _ in range(500)]
    assert [text for text in texts if theirs.encode(text) != ours.encode(text)] == []


@pytest.mark.parametrize("pattern", [None, R50K_PATTERN, LLAMA3_PATTERN, CL100K_PATTERN])
def test_every_character_has_the_same_ids_in_company(pattern: str | None, tmp_path: Path) -> None:
    """Pairs that are one token where the pattern leaves them together: both know the same letters and digits."""
    pairs = [before + chr(code) for code in range(0x21, 0x3400) if not 0xD800 <= code < 0xE000 for before in "a1 "]
    pairs += ["a" + chr(code) for code in [*range(0x3400, 0xD800, 50), *range(0xE000, 0x33480, 5)]]
    if pattern is None:
        ours: Tokenizer = ByteTokenizer()
    else:
        ranks = dict(BYTES)
        for pair in pairs:
            ranks.setdefault(pair.encode(), len(ranks))
        ours = of_pattern(pattern, ranks, {"<|endoftext|>": len(ranks)})
    theirs, text = reread(ours, tmp_path), "\n".join(pairs) + "  12345678\r\n\r\n  \n x'S'\u017f 1'LL  "
    assert theirs.encode(text) == ours.encode(text)
    assert (theirs.vocab_size, theirs.eod_id) == (ours.vocab_size, ours.eod_id)


def test_gaps_and_special_tokens_among_ranks_keep_their_ids(tmp_path: Path) -> None:
    ranks = BYTES | {b"th": 259, b"the": 262}
    ours = of_pattern(LLAMA3_PATTERN, ranks, {"<|end|>": 260, "<unused 261>": 270})
    theirs = reread(ours, tmp_path)
    text = "the th <|end|><unused 261> <unused 263>"
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode([262, 260, 270]) == "the<|end|><unused 261>"
    assert (theirs.vocab_size, theirs.eod_id) == (271, 260)


def test_merges_of_a_hundred_thousand_tokens_take_seconds() -> None:
    ranks = random_ranks(b"abcdefghijkl", 100_000, 0)
    begin = time.monotonic()
    merges_of(ranks)
    assert time.monotonic() - begin < 15
    begin = time.monotonic()
    assert len(merges_of(BYTES | {b"a" * (1 << k): 256 + k for k in range(1, 13)})) == 12
    assert time.monotonic() - begin < 15


def test_patterns_are_translated() -> None:
    assert oniguruma(r"\p{N}{1,3}+|[^\s]{2}+|a{2,}|x++|^\$|[$^]|\s++$") == (
        r"(?>\p{N}{1,3})|(?>[^\s]{2})|a{2,}|x++|\A\$|[$^]|\s++\z"
    )
    assert oniguruma(LLAMA3_PATTERN) == LLAMA3_PATTERN


@pytest.mark.parametrize(
    ("pattern", "special_tokens", "message"),
    [
        (r"(ab){1,2}+|[\s\S]", {"<|end|>": 256}, "repeats a group possessively; it cannot be exported"),
        (r"\w+|\W+", {"<|end|>": 256}, r"w\+.* cannot be exported: Hugging Face's tokenizers would split '½½"),
        (r"(?i:xss)|[\s\S]", {"<|end|>": 256}, "cannot be exported: it ignores the case of 'ss'"),
        (r"(?i:xs(?:T))|[\s\S]", {"<|end|>": 256}, "cannot be exported: it ignores the case of 'st'"),
        (r"(?i)xß|[\s\S]", {"<|end|>": 256}, "it ignores the case of 'ss'"),
        (r"(?x: a ) | [\s\S]", {"<|end|>": 256}, "cannot be exported"),
        (R50K_PATTERN, {"<|end|>": 2**31 - 2}, "the id 2147483646 of a token is above 4194304"),
        (R50K_PATTERN, {"a": 256}, "special token 'a' has the name of an ordinary token"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, pattern: str, special_tokens: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        save_hugging_face(of_pattern(pattern, BYTES, special_tokens), tmp_path / "out")
    assert not (tmp_path / "out").exists()
