"""What attends to what: the whole of a sequence, or each of its documents alone.

A document is a run of equal numbers in a row of `documents` [batch, sequence]; the same number further on, or in
another row, is another document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.config.schema import RunConfig
from megallama.layout.topology import AxisName
from megallama.parallel.mesh import Axis

AttentionCore = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [batch, heads, sequence, head_dim], keys and values of as many heads or fewer, to the like of queries.

What is rotated by which position is settled before it.
"""

LEAST_FLEX_HEAD = 16
"""Triton multiplies no narrower matrices, and with them torch's flex attention."""


@dataclass(frozen=True)
class FusedAttention:
    """Over a whole sequence, by torch's fused kernel where there is one."""

    causal: bool
    """Each position attends to itself and those before it; otherwise to all, as in BERT (arXiv 1810.04805)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1])

    def places(self, length: int, device: torch.device) -> Tensor:
        """Where in their sequence the `length` positions of this rank stand."""
        return torch.arange(length, device=device)

    def within(self, documents: Tensor, head_dim: int) -> AttentionCore:
        """The same inside each document, for tensors of one forward with that `head_dim`.

        On a GPU one kernel skips the blocks of the square that hold no pair (flex attention, arXiv 2412.05496); heads
        too narrow for it, and a CPU, take the documents one by one: both are exact.
        """
        if documents.is_cuda and head_dim >= LEAST_FLEX_HEAD:
            return partial(_flex_attention(), block_mask=self.block_mask(documents))
        # The lengths are other ones in every batch: a compiled layer would be compiled anew for each.
        apart: AttentionCore = torch.compiler.disable(partial(self._one_by_one, lengths=lengths(documents)))
        return apart

    def block_mask(self, documents: Tensor) -> Any:
        """The blocks of the square in which some position attends to another of its document."""

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = begun[batch, query] == begun[batch, key]
            return same & (query >= key) if self.causal else same

        begun, (rows, length) = beginnings(documents), documents.shape
        return _create_block_mask(documents.is_cuda)(seen, rows, None, length, length, device=documents.device)

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor, *, lengths: list[int]) -> Tensor:
        parts = [x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v)]
        found = [self(*(x.transpose(0, 1)[None] for x in each)).transpose(1, 2)[0] for each in zip(*parts, strict=True)]
        return torch.cat(found).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


causal_attention = FusedAttention(causal=True)


def attention_of(config: RunConfig, axes: Mapping[AxisName, Axis]) -> FusedAttention:
    """What trains towards the objective of a run, on a rank with these axes."""
    return FusedAttention(causal=config.train.objective == "causal")


def beginnings(documents: Tensor) -> Tensor:
    """The place in its row at which each token's document begins: [batch, sequence]."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return torch.where(begins, places, 0).cummax(dim=1).values


def positions(documents: Tensor) -> Tensor:
    """The place of each token in its document, or in the part of it that is in the row: [batch, sequence]."""
    return torch.arange(documents.shape[1], device=documents.device) - beginnings(documents)


def lengths(documents: Tensor) -> list[int]:
    """Of all documents, row after row."""
    begins = (positions(documents) == 0).flatten().nonzero().flatten()
    ends = F.pad(begins[1:], (0, 1), value=documents.numel())
    return list((ends - begins).tolist())


def flex_attention(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any) -> Tensor:
    """Attention over the blocks of a mask."""
    # Imported here: it brings torch's compiler with it, seconds that only those wait for who need it.
    from torch.nn.attention import flex_attention as flex

    result = flex.flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(result, Tensor)
    return result


@cache
def _flex_attention() -> Callable[..., Tensor]:
    """Compiled: without, it would hold the whole square."""
    return torch.compile(flex_attention)


@cache
def _create_block_mask(compiled: bool) -> Callable[..., Any]:
    """Compiled on a GPU, where the square of every row would be much to hold."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if compiled else create_block_mask
