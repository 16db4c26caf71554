"""Text from tokens as they come: whole characters, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from megallama.text.surrogates import without_surrogates
from megallama.text.tokenizer import Tokenizer

_LOST = "\ufffd"
_LONGEST_CHARACTER = 4
_FEW, _MANY = 32, 64
"""Tokens that are decoded together: above the first where a character ends, above the second anywhere."""


class TextStream:
    """Takes tokens one by one and gives text that nothing to come can change.

    Held back are bytes that may become a character, and what may be the beginning of a stop string. `before` are tokens
    in front of the first: some tokenizers write the first token of a text without its space.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [without_surrogates(text) for text in stop if text]
        self._ids = list(before[-_LONGEST_CHARACTER:])
        self._given = len(tokenizer.decode(self._ids))
        self._held = ""
        self.stopped = False
        """A stop string has come; what follows it is dropped."""

    def push(self, token: int) -> str:
        """The text that is certain with this token, from where the last call ended."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # What is no character yet shows as one U+FFFD, or as one for each of its bytes.
        certain = max(len(text.rstrip(_LOST)), len(text) - _LONGEST_CHARACTER + 1)
        whole = text[:certain] if len(self._ids) <= _MANY else text
        new, self._given = whole[self._given :], max(self._given, len(whole))
        if len(self._ids) > _FEW and len(whole) == len(text):
            del self._ids[:-_LONGEST_CHARACTER]
            self._given = len(self._tokenizer.decode(self._ids))
        return self._take(new)

    def end(self) -> str:
        """What was held back, once no token follows."""
        last = self._take(self._tokenizer.decode(self._ids)[self._given :])
        rest, self._held = self._held, ""
        return last if self.stopped else last + rest

    def _take(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]


class Stripped:
    """Gives a text that comes in pieces without the white space at its ends: in the middle of it, that waits."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def push(self, new: str) -> str:
        """What is certain of the text with this piece, from where the last call ended."""
        text = self._held + new if self._begun else new.lstrip()
        certain = text.rstrip()
        self._begun, self._held = self._begun or certain != "", text[len(certain) :]
        return certain


def _begun(text: str, stop: str) -> int:
    """How many characters of `stop` the text may end with."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
