"""FLOPs per token in both conventions, and the figures that authors printed."""

from __future__ import annotations

import pytest

from megallama.config.schema import ModelConfig
from megallama.layout.counts import flops_per_token, hardware_flops_per_token

LLAMA_2_7B = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_3_8B = LLAMA_2_7B.model_copy(update={"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8})
TINY_LLAMA = ModelConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)
LLAMA_32_3B = ModelConfig(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("model", "length", "full", "causal"),
    [
        (TINY_LLAMA, 2048, 7.31, 6.76),
        (LLAMA_32_3B, 4096, 23.50, 21.39),
        (LLAMA_2_7B, 4096, 46.08, 42.86),
        (LLAMA_3_8B, 8192, 57.91, 51.47),
    ],
)
def test_gigaflops_per_token(model: ModelConfig, length: int, full: float, causal: float) -> None:
    assert flops_per_token(model, length, "full") / 1e9 == pytest.approx(full, abs=0.005)
    assert flops_per_token(model, length, "causal") / 1e9 == pytest.approx(causal, abs=0.005)


@pytest.mark.parametrize(
    ("model", "length", "tokens_per_second", "peak", "printed"),
    [(LLAMA_3_8B, 8192, 6667, 989.4e12, 39.0), (TINY_LLAMA, 2048, 24000, 312e12, 56.3)],
)
def test_utilisation_that_authors_printed_in_the_full_convention(
    model: ModelConfig, length: int, tokens_per_second: float, peak: float, printed: float
) -> None:
    mfu = 100 * tokens_per_second * flops_per_token(model, length, "full") / peak
    assert mfu == pytest.approx(printed, abs=0.1)


def test_conventions_differ_by_half_the_attention() -> None:
    full, causal = (flops_per_token(LLAMA_3_8B, 8192, convention) for convention in ("full", "causal"))
    assert 2 * (full - causal) / full == pytest.approx(0.222, abs=0.001)


def test_full_recomputation_repeats_each_layer_but_not_the_head() -> None:
    head, matmul, attention = 128256 * 4096, 7_504_658_432, 32 * 4096 * 8192
    expected = 6 * head + 8 * (matmul - head) + 16 * attention
    assert hardware_flops_per_token(LLAMA_3_8B, 8192, "full") == expected
    for cheap in ("none", "selective"):
        assert hardware_flops_per_token(LLAMA_3_8B, 8192, cheap) == flops_per_token(LLAMA_3_8B, 8192, "full")
