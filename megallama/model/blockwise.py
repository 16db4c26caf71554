"""Causal attention on a CPU by larger products, and fewer of what is masked, than those of torch's kernel.

torch's flash attention takes 512 keys at a time, also where half of them are masked, and in bf16 it multiplies 64 rows
at a time, at a third of the rate of a CPU's matmul. Here each product is of a block of queries with the keys that they
see, for as many heads as leave their scores in the processors' caches: forward and backward take 0.75 to 0.85 times as
long in fp32, and 0.6 times in bf16, at 512 positions of 64 channels. Backward forms the scores again, so that as little
is kept as by flash attention. To torch's compiler each direction is one operator, whatever the number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS, BF16_ROWS = 64, 128
"""Wider blocks compute more of the half of the square that is masked; in narrower ones bf16's matmul is slower."""
CACHED = 2**20
"""Bytes of the scores of a block, for each thread."""


@torch.library.custom_op("megallama::blockwise_attention", mutates_args=())
def blockwise_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As F.scaled_dot_product_attention of q [batch, heads, n, head_dim], the last n positions of k and v.

    k and v [batch, kv_heads, positions, head_dim] have as many heads or fewer. Scores are rounded to the inputs' type.
    """
    out, later = _like_heads(q), _later(q)
    grouped, grouped_out = _by_keys(q, k), _by_keys(out, k)
    for heads, rows, keys in _blocks(q, k):
        weights = _weights(_stacked(grouped[:, heads, :, rows]), _stacked(k[:, heads, keys]), later, rows)
        _write(torch.bmm(weights, _stacked(v[:, heads, keys])), grouped_out[:, heads, :, rows])
    return out


@torch.library.custom_op("megallama::blockwise_attention_backward", mutates_args=())
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by q, k and v."""
    by_q, later = _like_heads(q), _later(q)
    grouped, grouped_grad, grouped_by_q = (_by_keys(each, k) for each in (q, grad, by_q))
    precise = torch.promote_types(k.dtype, torch.float32)
    by_k, by_v = (torch.zeros(k.shape, dtype=precise) for _ in range(2))
    for heads, rows, keys in _blocks(q, k):
        queries, grads = (_stacked(each[:, heads, :, rows]) for each in (grouped, grouped_grad))
        k_block, v_block = (_stacked(each[:, heads, keys]) for each in (k, v))
        weights = _weights(queries, k_block, later, rows)
        _add_product(by_v[:, heads, keys], weights, grads, 1.0)
        by_weights = torch.bmm(grads, v_block.transpose(1, 2))
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        _add_product(by_k[:, heads, keys], by_scores, queries, _scale(q))
        _write(_product(by_scores, k_block, _scale(q)), grouped_by_q[:, heads, :, rows])
    return by_q, by_k.to(k.dtype), by_v.to(v.dtype)


@blockwise_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _like_heads(q)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like_heads(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


blockwise_attention.register_autograd(_gradients, setup_context=_keep)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Heads of keys, queries, and the keys that the last of these sees."""
    (batch, every, count), (kv_heads, positions) = q.shape[:3], k.shape[1:3]
    most = CACHED * torch.get_num_threads()
    for start in range(0, count, _rows(q)):
        stop = min(start + _rows(q), count)
        keys = positions - count + stop
        together = max(1, most // (batch * every // kv_heads * (stop - start) * keys * q.element_size()))
        for head in range(0, kv_heads, together):
            yield slice(head, head + together), slice(start, stop), slice(0, keys)


def _weights(queries: Tensor, keys: Tensor, later: Tensor, rows: slice) -> Tensor:
    """softmax of the scores [heads, rows, keys] of queries that are the last of their keys."""
    scores, width = _product(queries, keys.transpose(1, 2), _scale(queries)), rows.stop - rows.start
    # All heads that share keys lie below one another.
    scores[:, :, -width:].unflatten(1, (-1, width)).masked_fill_(later[:width, :width], float("-inf"))
    return torch.softmax(scores, dim=-1)


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """a by b and by the factor, block by block and in one pass."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=factor)


def _add_product(sums: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Add transposed a by b and by the factor to sums [batch, kv_heads, keys, head_dim]."""
    if sums.dtype == a.dtype and sums.shape[0] == 1:  # in one pass
        sums[0].baddbmm_(a.transpose(1, 2), b, alpha=factor)
    else:
        sums.add_(torch.bmm(a.transpose(1, 2), b).view(sums.shape), alpha=factor)


def _rows(q: Tensor) -> int:
    return BF16_ROWS if q.dtype == torch.bfloat16 else ROWS


def _scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def _later(q: Tensor) -> Tensor:
    """What the queries of a block do not see of as many last keys."""
    return torch.ones(_rows(q), _rows(q), dtype=torch.bool).triu(1)


def _by_keys(x: Tensor, k: Tensor) -> Tensor:
    """[batch, heads, n, head_dim] as [batch, kv_heads, heads of the same keys, n, head_dim]."""
    return x.unflatten(1, (k.shape[1], -1))


def _stacked(x: Tensor) -> Tensor:
    """A block [batch, kv_heads, ..., rows, head_dim] as [batch * kv_heads, all of its rows, head_dim]."""
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])


def _write(rows: Tensor, out: Tensor) -> None:
    out.copy_(rows.view(out.shape))


def _like_heads(q: Tensor) -> Tensor:
    """[batch, heads, n, head_dim] in memory as projections have it, with the heads of a position side by side."""
    return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)
