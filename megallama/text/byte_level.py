"""tiktoken's ranks as the files of a byte-level BPE that Hugging Face's `tokenizers` and `transformers` read.

tiktoken merges the adjacent parts whose joint bytes have the lowest rank, `tokenizers` the adjacent pair that stands
first in a list of pairs. The parts of which tiktoken makes a token are always the same two: as long as nothing has
merged across the ends of the token, what happens between them is what happens to its bytes alone. So the pair of each
token is where tiktoken's own algorithm arrives on its bytes, and a token where it does not arrive has none: tiktoken
gives its id only to a piece of text that it is whole, which `ignore_merges` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import tiktoken
from tokenizers import Regex, pre_tokenizers

from megallama.errors import UserError
from megallama.text.split_pattern import R50K_PATTERN, TRIAL_TEXTS

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"

BEGIN_OF_TEXT = "<|begin_of_text|>"
MOST_IDS = 1 << 22
"""Ids without a token are written out, so they must not be without end."""


def _stand_ins() -> list[str]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 is itself, others are U+0100 and up in their order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in.get(byte, chr(byte)) for byte in range(256)]


STAND_INS = _stand_ins()
_LATIN_1 = {byte: character for byte, character in enumerate(STAND_INS)}


def byte_level_files(
    ranks: Mapping[bytes, int], pattern: str | None, special_tokens: Mapping[str, int], end: str
) -> dict[str, bytes]:
    """Name -> content of the files. Without `pattern` text is not split, and merges alone make tokens.

    UserError for a special token that has the name of another token, for ids above MOST_IDS, and for a pattern that
    cannot be written for Oniguruma, the regular expressions of `tokenizers`.
    """
    vocabulary = {_written(token): rank for token, rank in ranks.items()}
    for name in special_tokens:
        if name in vocabulary:
            raise UserError(f"the special token {name[:40]!r} has the name of an ordinary token; it cannot be exported")
    vocabulary |= special_tokens
    taken = set(vocabulary.values())
    if max(taken) > MOST_IDS:
        raise UserError(f"the id {max(taken)} of a token is above {MOST_IDS}; this tokenizer cannot be exported")
    # No text has these: a blank has a stand-in. Without them, a token that a user adds would get an id that is taken.
    vocabulary = {f"<unused {number}>": number for number in range(max(taken)) if number not in taken} | vocabulary
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(name, number) for name, number in sorted(special_tokens.items(), key=lambda it: it[1])],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(pattern),
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pattern is not None,
            "vocab": dict(sorted(vocabulary.items(), key=lambda it: it[1])),
            "merges": [f"{_written(left)} {_written(right)}" for left, right in merges_of(ranks)],
        },
    }
    begin = BEGIN_OF_TEXT if BEGIN_OF_TEXT in special_tokens else None
    return {TOKENIZER_NAME: _json(content), **config_files(end, begin)}


def config_files(end: str, begin: str | None = None) -> dict[str, bytes]:
    """What AutoTokenizer reads beside tokenizer.json: no class of its own, which would build other rules of splitting.

    `begin` is named and not added: documents here begin without it.
    """
    special = {"eos_token": end} | ({"bos_token": begin} if begin else {})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
    }
    return {CONFIG_NAME: _json(config), SPECIAL_NAME: _json(special)}


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of which tiktoken makes each token of two bytes or more, in the order of the tokens' ranks."""
    ordered = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    return [parts for token in ordered if (parts := _last_two(token, ranks))]


def _last_two(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """What tiktoken's merges leave of the bytes of `token` just before its own, None if they end before."""
    never = 1 << 62
    parts = [token[i : i + 1] for i in range(len(token))]
    joint = [ranks.get(token[i : i + 2], never) for i in range(len(token) - 1)]
    while len(parts) > 2:
        lowest = min(joint)
        if lowest == never:
            return None
        at = joint.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joint[at]
        for i in (at - 1, at):
            if 0 <= i < len(joint):
                joint[i] = ranks.get(parts[i] + parts[i + 1], never)
    return parts[0], parts[1]


_ATOM = re.compile(
    r"(?P<atom>\\[pPx]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])+\]|[\s\S])(?P<counted>\{[0-9]+(?:,[0-9]*)?\}\+)?", re.DOTALL
)


def oniguruma(pattern: str) -> str:
    """`pattern` of tiktoken (Rust's fancy-regex) for Oniguruma with Ruby's syntax, where three things mean others.

    `{1,3}+` repeats again there, and is possessive here; `$` and `^` are the ends of lines, and of the text here.
    """

    def translate(found: re.Match[str]) -> str:
        atom = {"$": r"\z", "^": r"\A"}.get(found["atom"], found["atom"])
        if not found["counted"]:
            return atom
        if atom == ")":
            raise UserError(f"the pattern {pattern[:60]!r} repeats a group possessively; it cannot be exported")
        return f"(?>{atom}{found['counted'][:-1]})"

    return _ATOM.sub(translate, pattern)


_ANY_CASE = re.compile(r"\(\?[a-z]*i")
_NO_TEXT = re.compile(r"\\[pP]\{[^}]*\}|\(\?[a-z]*:|[()]")
_LAST_FOLDED = 0xFB17
"""The last character that is several in another case."""


def _folds_to_several(pattern: str) -> str | None:
    """What of a pattern that ignores case stands for one character as well, as `ss` for \u00df, or None.

    It does for Oniguruma alone: fancy-regex folds character by character.
    """
    if not _ANY_CASE.search(pattern):
        return None
    several = {folded for code in range(_LAST_FOLDED + 1) if len(folded := chr(code).casefold()) > 1}
    text = _NO_TEXT.sub("", pattern).casefold()
    return next((folded for folded in sorted(several) if folded in text), None)


def _split(pattern: str) -> str:
    """The regular expression that makes `tokenizers` split as tiktoken does at `pattern`; UserError if there is none.

    What else the two may understand otherwise is tried out: a piece of text that is a token is one for both.
    """
    translated = oniguruma(pattern)
    if (folded := _folds_to_several(pattern)) is not None:
        raise UserError(
            f"the pattern {pattern[:60]!r} cannot be exported: it ignores the case of {folded!r}, for which Hugging "
            "Face's tokenizers would also take a character that stands for all of it"
        )
    try:
        split = pre_tokenizers.Split(Regex(translated), behavior="isolated")
    except Exception as error:  # the library has no class of its own
        raise UserError(f"the pattern {pattern[:60]!r} cannot be exported ({error})") from None
    pieces = [[piece.encode() for piece, _ in split.pre_tokenize_str(text)] for text in TRIAL_TEXTS]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in chain.from_iterable(pieces):
        ranks.setdefault(piece, len(ranks))
    encoding = tiktoken.Encoding("split", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text, some in zip(TRIAL_TEXTS, pieces, strict=True):
        if encoding.encode_ordinary(text) != [ranks[piece] for piece in some]:
            raise UserError(
                f"the pattern {pattern[:60]!r} cannot be exported: Hugging Face's tokenizers would split "
                f"{text[:40]!r} elsewhere"
            )
    return translated


def _pre_tokenizer(pattern: str | None) -> dict[str, Any]:
    if pattern is None or pattern == R50K_PATTERN:
        return _byte_level(use_regex=pattern is not None)  # whose own regular expression is GPT-2's
    split = {"type": "Split", "pattern": {"Regex": _split(pattern)}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _added(name: str, number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": name, **flags}


def _written(token: bytes) -> str:
    return token.decode("latin-1").translate(_LATIN_1)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
