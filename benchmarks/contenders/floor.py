"""The floor of a step: the matrix products of the model's own shapes and nothing else.

Of every micro-batch: each product of a layer and of the head with both its gradients, and attention's two products with
the four of their gradients at the causal half. A model that computes all of them cannot take less time, as long as it
leaves the products to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megallama.config.schema import RunConfig

Product = Callable[[], object]
Draw = Callable[..., Tensor]
NAME = "floor"


def floor_step(config: RunConfig, device: torch.device) -> Callable[[], float]:
    """All products of an optimizer step."""
    draw = drawing(config, device)
    layer = [product for shape in layer_shapes(config) for product in linear(*shape, draw)]
    layer += attention(config, draw)
    micro_batch = layer * config.model.num_hidden_layers + list(linear(*head_shape(config), draw))
    return run_all(micro_batch * (config.train.global_batch_size // config.train.micro_batch_size))


def run_all(products: Sequence[Product]) -> Callable[[], float]:
    """One after the other; the loss that it returns is none."""

    def step() -> float:
        for product in products:
            product()
        return math.nan

    return step


def drawing(config: RunConfig, device: torch.device) -> Draw:
    """Random tensors in the type of the run."""
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    draws = torch.Generator().manual_seed(config.train.seed)
    return lambda *shape: torch.randn(shape, generator=draws).to(device, dtype)


def layer_shapes(config: RunConfig) -> Iterator[tuple[int, int, int]]:
    """(positions, inputs, outputs) of the linear layers of a decoder layer: qkv, o, gate and up, down."""
    model, positions = config.model, config.train.micro_batch_size * config.data.sequence_length
    query, key = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    yield positions, model.hidden_size, query + 2 * key
    yield positions, query, model.hidden_size
    yield positions, model.hidden_size, 2 * model.intermediate_size
    yield positions, model.intermediate_size, model.hidden_size


def head_shape(config: RunConfig) -> tuple[int, int, int]:
    """(positions, inputs, outputs) of the head."""
    positions = config.train.micro_batch_size * config.data.sequence_length
    return positions, config.model.hidden_size, config.model.vocab_size


def linear(positions: int, inputs: int, outputs: int, draw: Draw) -> Iterator[Product]:
    """A product as of F.linear, and the gradients of its inputs and of its weight."""
    x, weight, gradient = draw(positions, inputs), draw(outputs, inputs), draw(positions, outputs)
    y, by_x, by_weight = (torch.empty_like(like) for like in (gradient, x, weight))
    yield lambda: torch.mm(x, weight.t(), out=y)
    yield lambda: torch.mm(gradient, weight, out=by_x)
    yield lambda: torch.mm(gradient.t(), x, out=by_weight)


def attention(config: RunConfig, draw: Draw) -> Iterator[Product]:
    """Scores and values, and the gradients of queries, keys, weights and values, over half of the square."""
    model, length = config.model, config.data.sequence_length
    heads, size, keys = config.train.micro_batch_size * model.num_attention_heads, model.head_size, length // 2
    q, k, weights = draw(heads, length, size), draw(heads, keys, size), draw(heads, length, keys)
    of_q, of_k, of_weights = (torch.empty_like(like) for like in (q, k, weights))
    yield lambda: torch.bmm(q, k.mT, out=of_weights)
    yield lambda: torch.bmm(weights, k, out=of_q)
    yield lambda: torch.bmm(q, k.mT, out=of_weights)
    yield lambda: torch.bmm(weights.mT, q, out=of_k)
    yield lambda: torch.bmm(weights, k, out=of_q)
    yield lambda: torch.bmm(weights.mT, q, out=of_k)
