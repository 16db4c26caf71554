"""Text from a model: what follows some prompts, piece by piece or whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megallama.errors import UserError
from megallama.generation.batch import Batch, Ended, Row
from megallama.generation.load import Loaded
from megallama.generation.sampling import Sampling
from megallama.text.surrogates import without_surrogates

ROWS = 32
"""Texts that are written at once."""


@dataclass(frozen=True)
class Piece:
    """New text of one sample of one prompt."""

    prompt: int
    sample: int
    text: str
    ended: Ended | None


def write(
    loaded: Loaded,
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    samples: int = 1,
    rows: int = ROWS,
) -> Iterator[Piece]:
    """What follows each of `prompts`, in as many samples, as it is written; up to `rows` texts at once.

    Samples of a prompt differ by their seed; the text of one depends neither on the others nor on other prompts.
    UserError where the logits are not finite.
    """
    wanted = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(samples)]
    batch = Batch(loaded, min(rows, max(1, len(wanted))))
    encoded = [loaded.encode(prompt) for prompt in prompts]
    waiting, places = iter(wanted), dict[Row, tuple[int, int]]()
    while True:
        while len(batch.rows) < batch.size and (following := next(waiting, None)) is not None:
            row = Row(loaded, encoded[following[0]], max_tokens, sampling, stop, following[1])
            places[row] = following
            batch.add(row)
        if not batch.rows:
            return
        for row, text in batch.step():
            if row.ended == "error":
                raise UserError(not_finite(loaded))
            if text or row.ended:
                yield Piece(*places[row], text, row.ended)


def generate(loaded: Loaded, prompt: str, max_tokens: int, sampling: Sampling) -> str:
    """The prompt and what follows it, until the end of a document or `max_tokens` new tokens."""
    return without_surrogates(prompt) + "".join(piece.text for piece in write(loaded, [prompt], max_tokens, sampling))


def not_finite(loaded: Loaded) -> str:
    """The sentence on a model that gives no numbers."""
    return (
        f"the logits of {loaded.source} are not finite after this text: its weights are damaged or have diverged; use "
        "an earlier checkpoint, or --dtype fp32"
    )
