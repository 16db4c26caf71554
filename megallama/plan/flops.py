"""Floating-point operations of training, per token. Pure.

Two conventions are in print and both are offered. `full` counts attention over the whole square of positions (PaLM,
nanoGPT, torchtitan), `causal` over the half that a causal kernel computes (recent Megatron-LM). MFU uses one of these;
recomputed work is in neither, and counts only as hardware FLOPs (HFU).
"""

from __future__ import annotations

from typing import Literal

from megallama.config.schema import ModelConfig
from megallama.plan.params import count_parameters

Convention = Literal["full", "causal"]


def attention_flops_per_token(model: ModelConfig, sequence_length: int, convention: Convention) -> int:
    """Scores and weighted values, forward and backward: 12 (full) or 6 (causal) * layers * query width * sequence."""
    query_width = model.num_attention_heads * model.head_size
    factor = 12 if convention == "full" else 6
    return factor * model.num_hidden_layers * query_width * sequence_length


def flops_per_token(model: ModelConfig, sequence_length: int, convention: Convention = "full") -> int:
    """Forward and backward of one token: 6 * matmul weights + attention, as arXiv 2204.02311, appendix B."""
    attention = attention_flops_per_token(model, sequence_length, convention)
    return 6 * count_parameters(model).matmul + attention


def hardware_flops_per_token(model: ModelConfig, sequence_length: int, recompute: str) -> int:
    """What is computed, recomputation included, in the full convention.

    `full` runs each layer's forward again, the output head's not: 8 instead of 6 per layer weight, 16 instead of 12 for
    attention (arXiv 2205.05198, appendix A). `selective` repeats an elementwise product, which no convention counts.
    """
    once = flops_per_token(model, sequence_length, "full")
    if recompute != "full":
        return once
    count = count_parameters(model)
    forward_again = 2 * (count.matmul - count.head_matmul)
    return once + forward_again + attention_flops_per_token(model, sequence_length, "full") // 3
