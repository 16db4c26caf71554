"""Much text to token ids by gigatoken, held against the tokenizer itself all the while.

gigatoken (the extra `fast`) takes the rules of a tokenizer.json and remembers the ids of words that it has seen: it
needs a tenth of the time. A dataset must not depend on whether it is installed, so one text in CHECKED is encoded by
the tokenizer as well, and a difference ends the build. Where the two are known to differ, the tokenizer is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil

from megallama.errors import UserError
from megallama.text.byte_level import STAND_INS, TOKENIZER_NAME
from megallama.text.split_pattern import LLAMA3_PATTERN, O200K_PATTERN, R50K_PATTERN
from megallama.text.surrogates import without_surrogates
from megallama.text.tokenizer import ByteTokenizer, Encoder, TiktokenTokenizer, Tokenizer

CHECKED = 100

# gigatoken 0.10 forgets no word: of text without end it would take memory without end.
MOST_REMEMBERED = 96 << 20
"""Bytes by which a process may grow before gigatoken begins again."""
CHARACTERS_PER_LOOK = 4_000_000

# gigatoken takes others as well, some for one that splits rare texts elsewhere; all texts of a few characters, and each
# character between others, are tested for these.
_TESTED_PATTERNS = (R50K_PATTERN, LLAMA3_PATTERN, O200K_PATTERN)
_BYTES = frozenset(STAND_INS)

# Letters, digits and marks of Unicode 17, which gigatoken knows; to tiktoken 0.14 they are no letters yet.
_NEWER = (
    "88f c5c cdc 1acf-1add 1ae0-1aeb a7ce-a7cf a7d2 a7d4 a7f1 10940-10959 10ec5-10ec7 10efa-10efb 11b60-11b67 "
    "11db0-11ddb 11de0-11de9 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18d09-18d1e 18d80-18df2 1e6c0-1e6de "
    "1e6e0-1e6f5 1e6fe-1e6ff 2b73a-2b73f 2cea2-2cead 323b0-33479"
)


def _characters(ranges: str) -> frozenset[str]:
    ends = ((first, last or first) for first, _, last in (word.partition("-") for word in ranges.split()))
    return frozenset(chr(code) for first, last in ends for code in range(int(first, 16), int(last, 16) + 1))


_NEWER_CHARACTERS = _characters(_NEWER)
# A class of all of them takes seven times as long: `re` compares with each range beyond U+FFFF in turn.
_PERHAPS_NEWER = re.compile(
    f"[{''.join(sorted(c for c in _NEWER_CHARACTERS if c < chr(0x10000)))}\U00010000-\U0010ffff]"
)

_ADVICE = "pip uninstall gigatoken, and repeat the command"

_Found = TypeVar("_Found")


class EncodersDifferError(UserError):
    """gigatoken and the tokenizer give different ids: no earlier ids of gigatoken can be trusted."""


class CheckedEncoder:
    """The ids of a tokenizer, most of them by gigatoken."""

    def __init__(self, tokenizer: Tokenizer, rules: bytes) -> None:
        """`rules` are those of `tokenizer` as a tokenizer.json.

        ValueError or RuntimeError if gigatoken cannot follow them.
        """
        from gigatoken import Tokenizer as Library

        self._tokenizer, self._rules = tokenizer, rules
        self._new_library = partial(_panics_raised, partial(Library.from_json, rules))
        self._library: Any = self._new_library()
        self._resident, self._characters = _resident_bytes(), 0
        self.eod_id = tokenizer.eod_id
        self._texts = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckedEncoder, (self._tokenizer, self._rules)

    def pieces(self, text: str) -> Iterator[npt.NDArray[np.integer[Any]]]:
        """EncodersDifferError where gigatoken gives other ids than the tokenizer, or none."""
        checked = self._texts % CHECKED == 0
        self._texts += 1
        for part in self._tokenizer.parts(without_surrogates(text)):
            if _has_newer_characters(part):
                yield from self._tokenizer.pieces(part)
                continue
            ids = self._ids(part)
            if checked and ids.tolist() != self._tokenizer.encode(part):
                raise EncodersDifferError(f"gigatoken gives other ids than the tokenizer for {part[:40]!r}; {_ADVICE}")
            yield ids

    def _ids(self, part: str) -> npt.NDArray[np.uint32]:
        self._characters += len(part)
        if self._characters > CHARACTERS_PER_LOOK:
            self._forget_much()
        try:
            return _panics_raised(partial(self._library.encode, part))
        except ValueError as error:
            raise EncodersDifferError(f"gigatoken cannot encode {part[:40]!r} ({error}); {_ADVICE}") from None

    def _forget_much(self) -> None:
        self._characters = 0
        if _resident_bytes() > self._resident + MOST_REMEMBERED:
            del self._library  # two at once would take twice the memory
            self._library = self._new_library()
            self._resident = _resident_bytes()


def checked_encoder(tokenizer: Tokenizer) -> Encoder:
    """A fast encoder for `tokenizer` where gigatoken is installed and can follow its rules, otherwise `tokenizer`."""
    if isinstance(tokenizer, ByteTokenizer) or not find_spec("gigatoken"):
        return tokenizer
    try:
        return CheckedEncoder(tokenizer, _rules_of_text(tokenizer))
    except (UserError, ValueError, RuntimeError, ImportError, AttributeError):  # broken or another version, too
        return tokenizer


def _rules_of_text(tokenizer: Tokenizer) -> bytes:
    """The tokenizer.json by which a text has its ids, without what cuts, frames or marks one.

    ValueError if it is no byte-level BPE at a tested pattern, rewrites the text, or adds tokens of the text to its
    model.
    """
    rules = json.loads(tokenizer.hugging_face_files()[TOKENIZER_NAME])
    model, added = rules["model"], rules.get("added_tokens") or ()
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type") != "BPE" or model.get("byte_fallback") or affixes or rules.get("normalizer"):
        raise ValueError("no byte-level BPE of the text as it is")
    if not all(token.get("special") for token in added):
        raise ValueError("tokens of the text stand among the special ones")
    if _pattern(rules.get("pre_tokenizer")) not in _TESTED_PATTERNS:
        raise ValueError("text is split at another pattern, or more than once")
    if len({*map(str, model["merges"])}) < len(model["merges"]):
        raise ValueError("gigatoken takes the first place of a merge, tokenizers the last")
    # To gigatoken any entry is the bytes of a text, to tokenizers only one in stand-ins; and to tiktoken a special
    # token is none.
    names = tokenizer.special_tokens if isinstance(tokenizer, TiktokenTokenizer) else {}
    vocabulary = {name: number for name, number in model["vocab"].items() if name not in names and {*name} <= _BYTES}
    kept = {name: rules.get(name) for name in ("version", "pre_tokenizer", "decoder")}
    return json.dumps(kept | {"added_tokens": [], "model": model | {"vocab": vocabulary}}).encode()


def _pattern(pre_tokenizer: Any) -> str | None:
    """The pattern at which byte-level words are split, None if anything else is done to them."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return R50K_PATTERN if pre_tokenizer.get("use_regex", True) else None
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def _has_newer_characters(text: str) -> bool:
    return not text.isascii() and not _NEWER_CHARACTERS.isdisjoint(_PERHAPS_NEWER.findall(text))


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def _panics_raised(call: Callable[[], _Found]) -> _Found:
    """What `call` returns; a panic of Rust, whose class can be imported nowhere, becomes a ValueError."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None
