"""A conversation with a model that continues text: a transcript, of which it writes the next answer."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from megallama.errors import UserError
from megallama.generation.batch import Batch, Row
from megallama.generation.generate import not_finite
from megallama.generation.load import Loaded
from megallama.generation.sampling import Sampling
from megallama.generation.text import Stripped

STOP = ("\nUser:",)
_SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System"}
ROLES = tuple(_SPEAKERS)
_COMMANDS = "/reset forgets what was said, /quit or Ctrl-D ends the chat, Ctrl-C ends an answer"

Message = tuple[str, str]
"""A role, of ROLES, and what it says."""


def transcript(messages: Sequence[Message]) -> str:
    """What the model continues: a line for each message, and the beginning of the assistant's next one."""
    return "\n".join([*(f"{_SPEAKERS[role]}: {said}" for role, said in messages), "Assistant:"])


def within(loaded: Loaded, messages: Sequence[Message], room: int) -> tuple[list[Message], list[int]]:
    """As many of the last messages as have at most `room` tokens together, and their ids.

    What is left begins with the user's words. UserError if not even the last one fits.
    """
    for first in range(len(messages)):
        if messages[first][0] == "user":
            kept = list(messages[first:])
            ids = loaded.encode(transcript(kept))
            if len(ids) <= room:
                return kept, ids
    raise UserError(f"this has {len(ids)} tokens, and the model's window has room for {room}; say less")


def talk(loaded: Loaded, max_tokens: int, sampling: Sampling) -> None:
    """Read lines and write answers, until the input ends."""
    typer.echo(f'{loaded.name} continues a transcript of "User:" and "Assistant:"; {_COMMANDS}.', err=True)
    window = loaded.config.max_position_embeddings
    most = min(max_tokens, window // 2)
    messages: list[Message] = []
    while (line := _line()) is not None:
        if line in ("/quit", "/reset"):
            if line == "/quit":
                return
            messages = []
        elif line.startswith("/"):
            typer.echo(f"{line.split()[0]} is no command; {_COMMANDS}.", err=True)
        elif line:
            try:
                messages, ids = within(loaded, [*messages, ("user", line)], window - most)
            except UserError as error:
                typer.echo(f"megallama: {error}", err=True)
                continue
            messages.append(("assistant", answer(loaded, ids, most, sampling)))


def _line() -> str | None:
    """What the user types; None at the end of the input. A Ctrl-C takes back what has been typed."""
    while True:
        try:
            return input("> ").strip()
        except KeyboardInterrupt:
            typer.echo()
        except EOFError:
            typer.echo()
            return None


def answer(loaded: Loaded, ids: Sequence[int], max_tokens: int, sampling: Sampling) -> str:
    """Print an answer as it is written; all of it, or what a Ctrl-C has left of it. UserError as `write`."""
    batch, stripped, written = Batch(loaded, 1), Stripped(), ""
    row = Row(loaded, ids, max_tokens, sampling, STOP)
    batch.add(row)
    try:
        while batch.rows:
            for _, text in batch.step():
                new = stripped.push(text)  # a blank stands after "Assistant:"
                written += new
                typer.echo(new, nl=False)
    except KeyboardInterrupt:
        pass
    typer.echo()
    if row.ended == "error":
        raise UserError(not_finite(loaded))
    return written
