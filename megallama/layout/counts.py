"""What a Llama without biases counts: its weights by name and shape, its parameters, its FLOPs per token. Pure.

Two conventions of FLOPs are in print and both are offered. `full` counts attention over the whole square of positions
(PaLM, nanoGPT, torchtitan), `causal` over the half that a causal kernel computes (recent Megatron-LM). MFU uses one of
these; recomputed work is in neither, and counts only as hardware FLOPs (HFU). A masked model computes the whole square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from megallama.config.schema import ModelConfig
    from megallama.config.train_keys import Objective

Convention = Literal["full", "causal"]

# Each rank's slice of the vocabulary is a multiple of this, for matmul speed (Megatron-LM,
# --make-vocab-size-divisible-by).
VOCAB_MULTIPLE = 128
LOGITS_AT_ONCE = 2**29
"""Bytes of logits that the loss forms at once, beside what they become."""
GATES_AT_ONCE = 2**27
"""Elements of gate and up that an MLP in tiles forms at once: a quarter of a GiB in bf16."""

FORWARD_AGAIN = ("full", "offload")
"""The values of train.recompute with which a backward runs the forward of whole layers again."""


def logits_at_once(size: int) -> int:
    """Elements of logits, of `size` bytes each, that the loss forms at once."""
    return LOGITS_AT_ONCE // size


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


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Counts of the whole model; terms as in arXiv 2302.13971 with grouped KV heads (arXiv 2305.13245)."""
    hidden = model.hidden_size
    query_width, kv_width = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    vocabulary = model.vocab_size * hidden
    return ParameterCount(
        embedding=vocabulary,
        head=0 if model.tie_word_embeddings else vocabulary,
        attention_per_layer=2 * hidden * query_width + 2 * hidden * kv_width,
        mlp_per_layer=model.mlp_matrices * hidden * model.intermediate_size,
        norms_per_layer=2 * hidden + (2 * model.head_size if model.qk_norm else 0),
        final_norm=hidden,
        layers=model.num_hidden_layers,
        head_matmul=vocabulary,
    )


def padded_vocabulary(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and head over all tensor-parallel ranks: up to a multiple of 128 * tp."""
    unit = VOCAB_MULTIPLE * tp_size
    return -(-vocab_size // unit) * unit


def weight_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight as one device would hold it, the vocabulary unpadded; a tied head is no weight of its own."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, model.hidden_size)}
    for layer in range(model.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _layer_shapes(model).items()}
    shapes["model.norm.weight"] = (model.hidden_size,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, model.hidden_size)
    return shapes


def _layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = model.hidden_size, model.intermediate_size
    query_width, kv_width = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    return {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query_width, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, query_width),
        **({f"self_attn.{part}_norm": (model.head_size,) for part in "qk"} if model.qk_norm else {}),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }


def kernel_convention(objective: Objective) -> Convention:
    """The convention that counts what attention computes towards an objective."""
    return "causal" if objective == "causal" else "full"


def attention_flops_per_token(model: ModelConfig, sequence_length: int, convention: Convention) -> int:
    """Scores and weighted values, forward and backward: 12 (full) or 6 (causal) * layers * query width * sequence."""
    query_width = model.num_attention_heads * model.head_size
    factor = 12 if convention == "full" else 6
    return factor * model.num_hidden_layers * query_width * sequence_length


def flops_per_token(model: ModelConfig, sequence_length: int, convention: Convention = "full", frozen: int = 0) -> int:
    """Forward and backward of one token: 6 * matmul weights + attention, as arXiv 2204.02311, appendix B.

    Of `frozen` ones no gradient is computed, which is 2 of the 6. What is sent back through them counts as if something
    below were always trained.
    """
    attention = attention_flops_per_token(model, sequence_length, convention)
    return 6 * count_parameters(model).matmul - 2 * frozen + attention


def hardware_flops_per_token(model: ModelConfig, sequence_length: int, recompute: str, frozen: int = 0) -> int:
    """What is computed, recomputation included, in the full convention.

    `full` and `offload` run each layer's forward again, the output head's not: 8 instead of 6 per layer weight, 16
    instead of 12 for attention (arXiv 2205.05198, appendix A). `selective` repeats an elementwise product, which no
    convention counts.
    """
    once = flops_per_token(model, sequence_length, "full", frozen)
    if recompute not in FORWARD_AGAIN:
        return once
    count = count_parameters(model)
    forward_again = 2 * (count.matmul - count.head_matmul)
    return once + forward_again + attention_flops_per_token(model, sequence_length, "full") // 3
