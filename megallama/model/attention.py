"""What attends to what: the whole of a sequence, or each of its documents alone; on one rank, or shared by several.

A document is a run of equal numbers in a row of `documents` [batch, sequence]; the same number further on, or in
another row, is another document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import activate_flash_attention_impl

from megallama.config.schema import RunConfig
from megallama.layout.compiled import LEAST_FLEX_HEAD, attends_in_blocks
from megallama.layout.topology import AxisName, context_slices
from megallama.model.blockwise import blockwise_attention
from megallama.parallel.collectives import all_to_all, gather
from megallama.parallel.mesh import ALONE, Axis

AttentionCore = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [batch, heads, sequence, head_dim], keys and values of as many heads or fewer, to the like of queries.

What is rotated by which position is settled before it.
"""

_HOPPER = 9


@dataclass(frozen=True)
class FusedAttention:
    """Over a whole sequence, by torch's fused kernel where there is one.

    Where the ranks of `cp` share a sequence, each has the queries of its own positions, and gathers the keys and values
    of all of them, which are few under grouped-query attention (arXiv 2407.21783, section 3.3.2).
    """

    causal: bool
    """Each position attends to itself and those before it; otherwise to all, as in BERT (arXiv 1810.04805)."""
    cp: Axis = ALONE
    in_blocks: bool = False
    """On a CPU by `blockwise_attention`, whose scores are rounded to the type of training."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self._whole(k, v)
        if not self.causal:
            return self._attend(q, k, v, causal=False)
        held, found = self._held(k.shape[2]), []
        for part, where in zip(q.split([each.stop - each.start for each in held], dim=2), held, strict=True):
            found.append(self._attend(part, k[:, :, : where.stop], v[:, :, : where.stop], causal=True))
        return found[0] if len(found) == 1 else heads_first(torch.cat([sequence_first(each) for each in found]))

    def places(self, length: int, device: torch.device) -> Tensor:
        """Where in their sequence the `length` positions of this rank stand."""
        held = self._held(length * self.cp.size)
        return torch.cat([torch.arange(each.start, each.stop, device=device) for each in held])

    def within(self, documents: Tensor, head_dim: int) -> AttentionCore:
        """The same inside each document, for tensors of one forward with that `head_dim`.

        On a GPU one kernel skips the blocks of the square that hold no pair (flex attention, arXiv 2412.05496); heads
        too narrow for it, and a CPU, take the documents one by one: both are exact.
        """
        if documents.is_cuda and head_dim >= LEAST_FLEX_HEAD:
            apart: AttentionCore = partial(_flex_attention(), block_mask=self.block_mask(documents))
        else:
            # The lengths are other ones in every batch: a compiled layer would be compiled anew for each.
            apart = torch.compiler.disable(partial(self._one_by_one, stretches=self.stretches(documents)))
        return apart if self.cp.size == 1 else lambda q, k, v: apart(q, *self._whole(k, v))

    def block_mask(self, documents: Tensor) -> Any:
        """The blocks of the rectangle in which some position of this rank attends to another of its document."""

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            place = places[query]
            same = begun[batch, place] == begun[batch, key]
            return same & (place >= key) if self.causal else same

        begun, (rows, length) = beginnings(documents), documents.shape
        places = self.places(length // self.cp.size, documents.device)
        return _create_block_mask(documents.is_cuda)(seen, rows, None, len(places), length, device=documents.device)

    def stretches(self, documents: Tensor) -> list[tuple[int, slice]]:
        """Of each stretch of this rank's positions that lies in one document, in order: its length, its keys.

        Keys are counted in all rows together, one behind the other. The queries are the last of them under causal
        attention.
        """
        found, (_, length) = [], documents.shape
        for row, starts in enumerate(positions(documents) == 0):
            begins = starts.nonzero().flatten().tolist()
            for held in self._held(length):
                for begin, end in pairwise([*begins, length]):
                    first, last = max(begin, held.start), min(end, held.stop)
                    if first < last:
                        keys = slice(row * length + begin, row * length + (last if self.causal else end))
                        found.append((last - first, keys))
        return found

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor, *, stretches: list[tuple[int, slice]]) -> Tensor:
        rows, (k, v) = q.transpose(1, 2).flatten(0, 1), (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
        parts = zip(rows.split([size for size, _ in stretches]), (keys for _, keys in stretches), strict=True)
        each = ((x.transpose(0, 1)[None] for x in (part, k[keys], v[keys])) for part, keys in parts)
        found = [self._attend(*tensors, causal=self.causal).transpose(1, 2)[0] for tensors in each]
        return torch.cat(found).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        return _attend(q, k, v, causal=causal, in_blocks=self.in_blocks and q.device.type == "cpu")

    def _held(self, length: int) -> list[slice]:
        return context_slices(length, self.cp.rank, self.cp.size)

    def _whole(self, k: Tensor, v: Tensor) -> Iterable[Tensor]:
        """Keys and values of the whole sequence, in its order. One collective for both: k and v are small."""
        if self.cp.size == 1:
            return k, v
        whole = in_order(gather(_stacked(k, v), 0, self.cp), 0, self.cp.size)
        return (heads_first(each) for each in whole.unbind(1))


@dataclass(frozen=True)
class ExchangedAttention(FusedAttention):
    """DeepSpeed-Ulysses (arXiv 2309.14509): each rank of `cp` has some heads of the whole sequence for a while.

    Tensors go from all heads of a part of the sequence to a part of the heads of all of it, and back.
    """

    of_all: FusedAttention = field(init=False)
    """Over the whole sequence. Made here: torch's compiler makes no such object inside a graph."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "of_all", FusedAttention(self.causal, in_blocks=self.in_blocks))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._over(self.of_all, q, k, v)

    def within(self, documents: Tensor, head_dim: int) -> AttentionCore:
        """As of FusedAttention."""
        return partial(self._over, self.of_all.within(documents, head_dim))

    def _over(self, core: AttentionCore, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, (k, v) = self._some_heads(sequence_first(q)), self._some_heads(_stacked(k, v)).unbind(1)
        found = sequence_first(core(heads_first(q), heads_first(k), heads_first(v)))
        return heads_first(all_to_all(by_rank(found, 0, self.cp.size), 0, 2, self.cp))

    def _some_heads(self, x: Tensor) -> Tensor:
        """[own positions, ..., heads, head_dim] -> [sequence, ..., heads / cp, head_dim]."""
        return in_order(all_to_all(x, x.dim() - 2, 0, self.cp), 0, self.cp.size)


causal_attention = FusedAttention(causal=True)


def attention_of(config: RunConfig, axes: Mapping[AxisName, Axis]) -> FusedAttention:
    """What trains towards the objective of a run, on a rank with these axes."""
    exchanges = config.parallel.context_mode == "ulysses" and axes["cp"].size > 1  # one rank has nothing to exchange
    kind = ExchangedAttention if exchanges else FusedAttention
    in_blocks = attends_in_blocks(config, on_gpu=False)
    return kind(config.train.objective == "causal", axes["cp"], in_blocks)


def use_fastest_kernel(device: torch.device) -> None:
    """On Hopper, have FlashAttention 3 (arXiv 2407.08608) take the place of torch's second, if its package is there."""
    if torch.cuda.get_device_capability(device)[0] == _HOPPER and find_spec("flash_attn_interface") is not None:
        activate_flash_attention_impl("FA3")


def heads_first(x: Tensor) -> Tensor:
    """[sequence, batch, heads, head_dim] as [batch, heads, sequence, head_dim], without a copy."""
    return x.permute(1, 2, 0, 3)


def sequence_first(x: Tensor) -> Tensor:
    """The inverse of `heads_first`."""
    return x.permute(2, 0, 1, 3)


def _stacked(k: Tensor, v: Tensor) -> Tensor:
    """Both in one tensor, [sequence, 2, batch, heads, head_dim]: a message for each would take twice the latency."""
    return torch.stack([sequence_first(k), sequence_first(v)], 1)


def in_order(x: Tensor, dim: int, size: int) -> Tensor:
    """What `size` ranks hold of a sequence, side by side along `dim`, in the order of the sequence."""
    if size == 1:
        return x
    heads, tails = x.unflatten(dim, (size, 2, -1)).unbind(dim + 1)
    return torch.cat([heads, tails.flip(dim)], dim).flatten(dim, dim + 1)


def by_rank(x: Tensor, dim: int, size: int) -> Tensor:
    """The inverse of `in_order`."""
    if size == 1:
        return x
    heads, tails = x.unflatten(dim, (2 * size, -1)).chunk(2, dim)
    return torch.stack([heads, tails.flip(dim)], dim + 1).flatten(dim, dim + 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, in_blocks: bool = False) -> Tensor:
    """By a fused kernel. Causal queries are the last of the positions of the keys.

    The heads of all rows are those of one: torch's kernels make gradients, and CUDA's flash attention reads output and
    gradient, in the order [batch, sequence, heads, head_dim], which is then that of hidden states.
    """
    grouped, rows = q.shape[1] != k.shape[1], q.shape[0]
    queries, keys = q.shape[2], k.shape[2]
    q, k, v = (each.flatten(0, 1)[None] for each in (q, k, v))
    if causal and in_blocks:
        return blockwise_attention(q, k, v)[0].unflatten(0, (rows, -1))
    mask: Tensor | None = None
    if causal and queries != keys:
        if _flash_takes(q, k, v):  # and the last query sees the last key; a mask would be as large as the rectangle
            found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
            return found[0].unflatten(0, (rows, -1))
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    found = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
    )
    return found[0].unflatten(0, (rows, -1))


def _flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether CUDA's flash attention takes them as they are; torch's own way to it pads heads to multiples of 8."""
    if not q.is_cuda or q.shape[-1] % 8:
        return False
    return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1]))


def beginnings(documents: Tensor) -> Tensor:
    """The place in its row at which each token's document begins: [batch, sequence]."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return torch.where(begins, places, 0).cummax(dim=1).values


def positions(documents: Tensor) -> Tensor:
    """The place of each token in its document, or in the part of it that is in the row: [batch, sequence]."""
    return torch.arange(documents.shape[1], device=documents.device) - beginnings(documents)


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
