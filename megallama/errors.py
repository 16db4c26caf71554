"""What a user can get wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def printable(text: str) -> str:
    """The text with escapes in the place of line ends, control characters and others that do not print."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def check_printable(option: str, name: str) -> None:
    """UserError where the `name` of a file that the words of `option` are to make does not print."""
    if not name.isprintable():
        raise UserError(f"{option} {name} holds line ends or other characters that do not print; use another name")


def refuse_hidden(words: Sequence[str]) -> None:
    """UserError for the first word of a command line that holds a character that does not print."""
    for word in words:
        if not word.isprintable():
            raise UserError(f"{word} holds a character that does not print; give it, or its file, another name")


class UserError(ValueError):
    """A mistake of the user's: one sentence with the offending value and the nearest legal fix.

    Commands print the sentence alone and leave with exit code 2; nothing has been written,
    unless a run was under way that ran out of memory. What it quotes reaches no terminal raw.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class SharedError(UserError):
    """A UserError that every rank raises, with the same words: rank 0 says it for all."""


@contextmanager
def alike() -> Iterator[None]:
    """Raise a UserError of the block as a SharedError: every rank comes to the same one there. Also a decorator."""
    try:
        yield
    except SharedError:
        raise
    except UserError as error:
        raise SharedError(str(error)) from None


@contextmanager
def refusing() -> Iterator[None]:
    """End the process where the block raises a UserError: its sentence on stderr, and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"megallama: {error}", file=sys.stderr)
        sys.exit(2)


class UnreachableError(UserError):
    """A UserError of a rank that cannot reach the others, and has nobody to say it for it."""


class NotFiniteError(SharedError):
    """What a run has loaded cannot be trained on: a weight, a moment or the first loss is not finite."""
