"""Much text to token ids by gigatoken, held against the tokenizer itself all the while.

gigatoken (the extra `fast`) takes the rules of a tokenizer.json and remembers the ids of words that it has seen: it
needs a tenth of the time. A dataset must not depend on whether it is installed, so one text in CHECKED is encoded by
the tokenizer as well, and a difference ends the build.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megallama.errors import UserError
from megallama.text.byte_level import TOKENIZER_NAME
from megallama.text.surrogates import without_surrogates
from megallama.text.tokenizer import ByteTokenizer, Encoder, Tokenizer

CHECKED = 100

_Found = TypeVar("_Found")


class CheckedEncoder:
    """The ids of a tokenizer, most of them by gigatoken."""

    def __init__(self, tokenizer: Tokenizer, rules: bytes) -> None:
        """`rules` are those of `tokenizer` as a tokenizer.json. ValueError if gigatoken cannot follow them."""
        from gigatoken import Tokenizer as Library

        self._tokenizer, self._rules = tokenizer, rules
        self._library = _panics_raised(partial(Library.from_json, rules))
        self.eod_id = tokenizer.eod_id
        self._texts = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckedEncoder, (self._tokenizer, self._rules)

    def pieces(self, text: str) -> Iterator[npt.NDArray[np.integer[Any]]]:
        """UserError where gigatoken gives other ids than the tokenizer, or none."""
        checked = self._texts % CHECKED == 0
        self._texts += 1
        for part in self._tokenizer.parts(without_surrogates(text)):
            try:
                ids = _panics_raised(partial(self._library.encode, part))
            except ValueError as error:
                raise UserError(f"gigatoken cannot encode {part[:40]!r} ({error}); {_ADVICE}") from None
            if checked and ids.tolist() != self._tokenizer.encode(part):
                raise UserError(f"gigatoken gives other ids than the tokenizer for {part[:40]!r}; {_ADVICE}")
            yield ids


_ADVICE = "pip uninstall gigatoken, and the same command goes on without it"


def checked_encoder(tokenizer: Tokenizer) -> Encoder:
    """A fast encoder for `tokenizer` where gigatoken is installed and has its rules, otherwise `tokenizer`."""
    if isinstance(tokenizer, ByteTokenizer) or not find_spec("gigatoken"):
        return tokenizer
    try:
        return CheckedEncoder(tokenizer, _rules_of_text(tokenizer))
    except (UserError, ValueError):
        return tokenizer


def _rules_of_text(tokenizer: Tokenizer) -> bytes:
    """The tokenizer.json of a tokenizer for which special tokens are text. ValueError if tokens are added to that."""
    rules = json.loads(tokenizer.hugging_face_files()[TOKENIZER_NAME])
    if not all(token.get("special") for token in rules.get("added_tokens", ())):
        raise ValueError("tokens of the text stand among the special ones")
    return json.dumps({**rules, "added_tokens": []}).encode()


def _panics_raised(call: Callable[[], _Found]) -> _Found:
    """What `call` returns; a panic of Rust, whose class can be imported nowhere, becomes a ValueError."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None
