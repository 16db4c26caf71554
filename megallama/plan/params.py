"""Exact parameter counts of a Llama without biases, as in the released weights. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# Each rank's slice of the vocabulary is a multiple of this, for matmul speed (Megatron-LM,
# --make-vocab-size-divisible-by).
VOCAB_MULTIPLE = 128


class Shape(Protocol):
    """What the parameters of a Llama follow from: a config.schema.ModelConfig, or a plan.shape.LlamaShape."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by where they are; the words in `terms` show the arithmetic."""

    embedding: int
    head: int
    """0 when the head is the embedding."""
    attention_per_layer: int
    mlp_per_layer: int
    norms_per_layer: int
    final_norm: int
    layers: int
    head_matmul: int
    """vocab * hidden, also when tied: the matmul is done either way."""

    @property
    def matmul_per_layer(self) -> int:
        """Weights of one layer that multiply every token."""
        return self.attention_per_layer + self.mlp_per_layer

    @property
    def per_layer(self) -> int:
        """All weights of one layer."""
        return self.matmul_per_layer + self.norms_per_layer

    @property
    def total(self) -> int:
        """All weights of the model, the vocabulary unpadded."""
        return self.layers * self.per_layer + self.final_norm + self.embedding + self.head

    @property
    def matmul(self) -> int:
        """All matmul weights with the output head, without the embedding's gather and the norms."""
        return self.layers * self.matmul_per_layer + self.head_matmul


def count_parameters(model: Shape) -> ParameterCount:
    """Counts of the whole model; terms as in arXiv 2302.13971 with grouped KV heads (arXiv 2305.13245)."""
    hidden = model.hidden_size
    query_width, kv_width = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    vocabulary = model.vocab_size * hidden
    return ParameterCount(
        embedding=vocabulary,
        head=0 if model.tie_word_embeddings else vocabulary,
        attention_per_layer=2 * hidden * query_width + 2 * hidden * kv_width,
        mlp_per_layer=3 * hidden * model.intermediate_size,
        norms_per_layer=2 * hidden,
        final_norm=hidden,
        layers=model.num_hidden_layers,
        head_matmul=vocabulary,
    )


def padded_vocabulary(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and head over all tensor-parallel ranks: up to a multiple of 128 * tp."""
    unit = VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // unit) * unit
