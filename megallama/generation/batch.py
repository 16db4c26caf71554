"""Many texts at once: rows join at any step, each gains one token a step, and a row that has ended makes room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

from megallama.generation.decoder import Decoder, first_seen
from megallama.generation.load import Loaded
from megallama.generation.sampling import Sampler, Sampling
from megallama.generation.text import TextStream

Ended = Literal["stop", "length", "error"]
"""By the end of a document or a stop string; by the number of tokens; by logits that are no numbers."""
_NO_TOKEN = -1


class Row:
    """A prompt, `ids`, and what is written after it: up to `max_tokens` tokens, as sample `number` of the prompt."""

    def __init__(
        self,
        loaded: Loaded,
        ids: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        number: int = 0,
    ) -> None:
        self.ids, self.begin, self.end = list(ids), len(ids), len(ids) + max_tokens
        self.sampler = Sampler(sampling, ids, loaded.config.vocab_size, loaded.device, number)
        self.text = TextStream(loaded.tokenizer, stop, ids)
        self.ended: Ended | None = None
        self.first: int | None = None
        """The first token of `ids` that is in the cache."""

    @property
    def new_tokens(self) -> int:
        """How many tokens have been written."""
        return len(self.ids) - self.begin

    def take(self, token: int, ends: frozenset[int]) -> str:
        """The text that is certain with this token."""
        if token == _NO_TOKEN or token in ends:
            self.ended = "error" if token == _NO_TOKEN else "stop"
            return self.text.end()
        self.ids.append(token)
        new = self.text.push(token)
        if self.text.stopped:
            self.ended = "stop"
        elif len(self.ids) == self.end:
            new += self.text.end()
            self.ended = "stop" if self.text.stopped else "length"
        return new


class Batch:
    """Up to `size` rows over one cache."""

    def __init__(self, loaded: Loaded, size: int) -> None:
        self.loaded, self.size = loaded, size
        self.rows: list[Row] = []
        self._decoder = Decoder(loaded.model, size)
        unused = loaded.unused
        self._unused = torch.tensor(unused, device=loaded.device) if unused else None

    def add(self, row: Row) -> None:
        """Let a row join at the next step."""
        assert len(self.rows) < self.size
        self.rows.append(row)

    def remove(self, row: Row) -> None:
        """Drop a row, wherever it stands; the last one takes its place in the cache."""
        place, last = self.rows.index(row), self.rows.pop()
        if row.ended == "error":
            self._decoder.clear(place)
        if last is not row:
            self.rows[place] = last
            if last.first is not None:
                self._decoder.move(len(self.rows), place, len(last.ids) - 1 - last.first)

    def step(self) -> list[tuple[Row, str]]:
        """One more token for every row; each row and its new text. Rows that have ended leave."""
        if not self.rows:
            return []
        self._read()
        lengths = [len(row.ids) - 1 - (row.first or 0) for row in self.rows]
        tokens = self._draw(self._decoder.advance([row.ids[-1] for row in self.rows], lengths))
        rows = list(self.rows)
        written = [(row, row.take(token, self.loaded.ends)) for row, token in zip(rows, tokens, strict=True)]
        for row in rows:
            if row.ended is not None:
                self.remove(row)
        return written

    def _read(self) -> None:
        """Bring into the cache what is new to it: rows that have joined, and those whose window moves on."""
        places, tokens = [], []
        for place, row in enumerate(self.rows):
            first = first_seen(len(row.ids), self._decoder.window)
            if first != row.first:
                row.first = first
                if len(row.ids) - first > 1:
                    places.append(place)
                    tokens.append(row.ids[first:-1])
        if places:
            self._decoder.read(places, tokens)

    @torch.inference_mode()
    def _draw(self, logits: torch.Tensor) -> list[int]:
        """A token for each row, or _NO_TOKEN where its logits are not finite; the same on every rank."""
        if self._unused is not None:
            logits.index_fill_(1, self._unused, -torch.inf)
        finite = logits.amax(dim=1).isfinite().tolist()
        drawn = [
            row.sampler.pick(each) if known else torch.tensor(_NO_TOKEN, device=logits.device)
            for row, each, known in zip(self.rows, logits, finite, strict=True)
        ]
        tokens = torch.stack(drawn)
        tp = self.loaded.model.tp_context.tp
        if tp.size > 1:
            # Equal logits give equal draws; a rank that saw others would wait for ever in the next collective.
            dist.broadcast(tokens, group=tp.group, group_src=0)
        found: list[int] = tokens.tolist()
        return found
