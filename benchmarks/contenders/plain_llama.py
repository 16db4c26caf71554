"""A Llama as one writes it for torch's own parallelism: linear layers one by one, under the names of Hugging Face.

`parallelize_module` and torch's pipelines ask for no more than that. With torch's kernels, fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megallama.config.schema import ModelConfig
from megallama.model.llama import Llama


class Attention(nn.Module):
    """Of as many heads as the rank's projections give."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size = config.head_size
        query, key = config.num_attention_heads * self.size, config.kv_heads * self.size
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (each.unflatten(-1, (-1, self.size)).transpose(1, 2) for each in projected)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(found.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainLlama(nn.Module):
    """Consecutive layers, with the embedding before the first and norm and head after the last.

    tokens or hidden states -> logits or hidden states.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, layers: Sequence[int], length: int) -> None:
        super().__init__()
        first, last = layers[0] == 0, layers[-1] == config.num_hidden_layers - 1
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if first else None
        self.layers = nn.ModuleDict({str(index): Layer(config) for index in layers})
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps) if last else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if last else None
        powers = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
        angles = torch.outer(torch.arange(length), config.rope_theta**-powers).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for layer in self.layers.values():
            x = layer(x, self.cos, self.sin)
        if self.norm is None or self.lm_head is None:
            return x
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[batch, heads, sequence, head_dim], turned by the angles of its positions."""
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-other, one), dim=-1) * sin


def whole_weights(ours: Llama) -> dict[str, Tensor]:
    """Of a whole model of ours, by the names of Hugging Face."""
    return {
        piece.name: piece.of(ours.get_parameter(name)).detach()
        for name, pieces in ours.shard_slices.items()
        for piece in pieces
    }


@torch.no_grad()
def fill(model: PlainLlama, weights: dict[str, Tensor]) -> PlainLlama:
    """Give the model its part of `weights`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name if name.startswith("lm_head") else f"model.{name}"])
    return model
