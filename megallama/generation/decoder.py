"""A Llama that reads tokens into a cache of keys and values and gives the logits of what follows.

Every row of a batch has a place in the cache and a length of its own. A row is read in two parts: `read` takes all of
its tokens but the last, at once, and `advance` the last tokens of all rows together. Rows are padded at their end,
where no earlier token sees it, and what padding leaves in the cache is behind a row's length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.model.attention import causal_attention
from megallama.model.llama import Llama
from megallama.model.rotary import rotation

LEAST_POSITIONS = 256
"""The cache begins with so many for each row, and doubles up to the window."""


def first_seen(length: int, window: int) -> int:
    """Which of `length` tokens is the first that the model sees.

    Where they are more than its window of `max_position_embeddings` tokens, the oldest drop out of sight, half a window
    at a time: what is left is read anew, from position 0 on, once for every half window of new tokens.
    """
    half = max(1, window // 2)
    return max(0, -(-(length - window) // half) * half)


class Decoder:
    """Keys and values of up to `rows` rows in front of a model, whose own forward is untouched."""

    def __init__(self, model: Llama, rows: int = 1) -> None:
        config = model.config
        assert model.embed_tokens is not None and model.norm is not None and model.lm_head is not None, "a whole model"
        self.model, self.window = model, config.max_position_embeddings
        self.device, self.dtype = model.norm.weight.device, model.norm.weight.dtype
        self.embed, self.norm, self.head = model.embed_tokens, model.norm, model.lm_head
        self.layers = list(model.layers.values())
        tp = model.tp_context.tp.size
        # Where tp does not divide the heads of keys, a rank holds one for each of its heads of queries.
        kv_heads = config.kv_heads // tp if config.kv_heads % tp == 0 else config.num_attention_heads // tp
        self._shape = (len(self.layers), 2, rows, kv_heads, 0, config.head_size)
        # Zeros: what is masked counts with weight 0, and 0 times what unwritten memory may hold is not always 0.
        self._cache = torch.zeros(self._shape, dtype=self.dtype, device=self.device)
        self._places = torch.arange(rows, device=self.device)
        self._reserve(min(LEAST_POSITIONS, self.window))

    @property
    def positions(self) -> int:
        """Positions of each row that the cache has room for at present."""
        return self._cache.shape[-2]

    @torch.inference_mode()
    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Put the keys and values of `tokens`, at most a window each, into the cache at `rows`, from position 0 on."""
        lengths = [len(each) for each in tokens]
        longest = max(lengths)
        self._reserve(longest)
        padded = torch.tensor([[*each, *[0] * (longest - len(each))] for each in tokens], device=self.device)
        cos, sin = self._cos[:longest], self._sin[:longest]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._cache[layer]
            for source, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                keys[row, :, :length] = k[source, :, :length]
                values[row, :, :length] = v[source, :, :length]
            return causal_attention(q, k, v)

        self._through(padded, cos, sin, attend)

    @torch.inference_mode()
    def advance(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Read one more token of each of the first rows; the logits [rows, vocabulary] of what follows it.

        `lengths` says of how many tokens each row's cache holds keys and values before this one.
        """
        count, longest = len(tokens), max(lengths) + 1
        self._reserve(longest)
        last = torch.tensor([[token] for token in tokens], device=self.device)
        if min(lengths) + 1 == longest:
            return self._advance_together(last, longest)
        where = torch.tensor(lengths, device=self.device)
        seen = torch.arange(longest, device=self.device) <= where[:, None, None, None]
        cos, sin = self._cos[where][:, None, None], self._sin[where][:, None, None]
        places = self._places[:count]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self._cache[layer]
            keys[places, :, where] = k[:, :, 0]
            values[places, :, where] = v[:, :, 0]
            return _attend_grouped(q, keys[:count, :, :longest], values[:count, :, :longest], seen)

        return self._logits(self._through(last, cos, sin, attend))

    def _advance_together(self, last: Tensor, longest: int) -> Tensor:
        """All rows have one length: neither a mask nor scattered places."""
        count = len(last)
        cos, sin = self._cos[longest - 1 : longest], self._sin[longest - 1 : longest]
        seen = self._cache[:, :, :count, :, :longest]
        new = seen[:, :, :, :, longest - 1 :]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (keys, values), (new_keys, new_values) = seen[layer], new[layer]
            new_keys.copy_(k)
            new_values.copy_(v)
            return _attend_grouped(q, keys, values, None)

        return self._logits(self._through(last, cos, sin, attend))

    @torch.inference_mode()
    def move(self, source: int, row: int, length: int) -> None:
        """Take what the cache holds of `length` tokens at `source` to `row`."""
        self._cache[:, :, row, :, :length] = self._cache[:, :, source, :, :length]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Forget what is not finite: it would reach later rows in this place, as 0 times infinity."""
        self._cache[:, :, row] = 0

    def _through(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        x: Tensor = self.embed(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, partial(attend, index))
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(hidden), None)
        return logits[:, -1].float()

    def _reserve(self, positions: int) -> None:
        """Room for so many positions: at least twice as many as before, so that copies stay few."""
        if positions <= self.positions:
            return
        room = min(self.window, max(positions, 2 * self.positions))
        grown = torch.zeros((*self._shape[:4], room, self._shape[5]), dtype=self.dtype, device=self.device)
        grown[:, :, :, :, : self.positions] = self._cache
        self._cache = grown
        cos, sin = rotation(torch.arange(room, device=self.device), self.model.frequencies)
        self._cos, self._sin = cos[0], sin[0]


def _attend_grouped(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """One query position [rows, heads, 1, head_dim] over all keys [rows, kv_heads, positions, head_dim].

    The heads of queries that share a head of keys become its queries: nothing is repeated.
    """
    grouped = q.view(q.shape[0], keys.shape[1], -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen).reshape(q.shape)
