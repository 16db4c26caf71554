"""Exact parameter counts of a Llama without biases, as in the released weights. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import ModelConfig

# Each rank's slice of the vocabulary is a multiple of this, for matmul speed (Megatron-LM,
# --make-vocab-size-divisible-by).
VOCAB_MULTIPLE = 128


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


def layers_per_stage(layers: int, pp_size: int) -> list[int]:
    """Layers on each pipeline stage; the first stages take one more where it does not divide. Sums to `layers`."""
    each, rest = divmod(layers, pp_size)
    return [each + (stage < rest) for stage in range(pp_size)]


@dataclass(frozen=True)
class RankParameters:
    """What the rank of one pipeline stage holds under tensor parallelism."""

    stage: int
    layers: int
    sharded: int
    """Weights cut over the tensor-parallel ranks, unpadded; rounded up where the vocabulary does not divide."""
    replicated: int
    """Norms, whole on every tensor-parallel rank."""
    padding: int
    """Rows that exist only to round the vocabulary up."""

    @property
    def total(self) -> int:
        """Parameters in this rank's memory before ZeRO."""
        return self.sharded + self.replicated + self.padding


def rank_parameters(model: ModelConfig, tp_size: int, pp_size: int) -> list[RankParameters]:
    """Parameters on a rank of each pipeline stage.

    The first stage has the embedding, the last the final norm and the head. A tied model holds its one matrix once if
    first and last stage are the same, and on both if not.
    """
    count = count_parameters(model)
    padded = padded_vocabulary(model.vocab_size, tp_size) * model.hidden_size // tp_size
    table = -(-model.vocab_size // tp_size) * model.hidden_size
    ranks = []
    for stage, layers in enumerate(layers_per_stage(model.num_hidden_layers, pp_size)):
        first, last = stage == 0, stage == pp_size - 1
        tables = 1 if first and last and model.tie_word_embeddings else int(first) + int(last)
        ranks.append(
            RankParameters(
                stage=stage,
                layers=layers,
                sharded=layers * count.matmul_per_layer // tp_size + tables * table,
                replicated=layers * count.norms_per_layer + (count.final_norm if last else 0),
                padding=tables * (padded - table),
            )
        )
    return ranks
