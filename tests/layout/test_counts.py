"""Counts against the released models, exactly."""

from __future__ import annotations

import pytest

from megallama.config.schema import ModelConfig
from megallama.layout.counts import count_parameters, padded_vocabulary


def shape(
    layers: int, hidden: int, width: int, heads: int, kv: int, size: int, vocab: int, tied: bool = False
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=size,
        tie_word_embeddings=tied,
    )


LLAMA_3_8B = shape(32, 4096, 14336, 32, 8, 128, 128256)
PUBLISHED = {
    "Llama-2 7B": (shape(32, 4096, 11008, 32, 32, 128, 32000), 6_738_415_616, 6_607_077_376),
    "Llama-2 13B": (shape(40, 5120, 13824, 40, 40, 128, 32000), 13_015_864_320, 12_851_609_600),
    "Llama-1 33B": (shape(60, 6656, 17920, 52, 52, 128, 32000), 32_528_943_616, 32_315_146_240),
    "Llama-1 65B": (shape(80, 8192, 22016, 64, 64, 128, 32000), 65_285_660_672, 65_022_197_760),
    "Llama-2 70B": (shape(80, 8192, 28672, 64, 8, 128, 32000), 68_976_648_192, 68_713_185_280),
    "Llama-3 8B": (LLAMA_3_8B, 8_030_261_248, 7_504_658_432),
    "Llama-3 70B": (shape(80, 8192, 28672, 64, 8, 128, 128256), 70_553_706_496, 69_501_714_432),
    "Llama-3.1 405B": (shape(126, 16384, 53248, 128, 8, 128, 128256), 405_853_388_800, 403_747_897_344),
    "Llama-3.2 1B": (shape(16, 2048, 8192, 32, 8, 64, 128256, True), 1_235_814_400, 1_235_746_816),
    "Llama-3.2 3B": (shape(28, 3072, 8192, 24, 8, 128, 128256, True), 3_212_749_824, 3_212_574_720),
    "TinyLlama 1.1B": (shape(22, 2048, 5632, 32, 4, 64, 32000), 1_100_048_384, 1_034_420_224),
    "110M": (shape(12, 768, 2048, 12, 12, 64, 32000, True), 109_529_856, 109_510_656),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_released_weights(name: str) -> None:
    model, total, matmul = PUBLISHED[name]
    assert (count_parameters(model).total, count_parameters(model).matmul) == (total, matmul)


@pytest.mark.parametrize(
    ("vocab", "padded"),
    [(32000, (32000, 32000, 32256, 32768)), (128256, (128256, 128256, 128512, 129024))],
)
def test_vocabulary_is_padded_as_in_megatron(vocab: int, padded: tuple[int, ...]) -> None:
    assert tuple(padded_vocabulary(vocab, tp) for tp in (1, 2, 4, 8)) == padded
