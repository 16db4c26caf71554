"""Shapes of wanted sizes: near enough, divisible, and those of published Llamas where these were asked for."""

from __future__ import annotations

from typing import Any

import pytest

from megallama.config.schema import ModelConfig
from megallama.errors import UserError
from megallama.layout.counts import count_parameters
from megallama.plan.sizing.shape import TOLERANCE, find_shape

# From 20M to 500B, evenly in the logarithm.
SIZES = [20e6 * (500e9 / 20e6) ** (i / 60) for i in range(61)]


@pytest.mark.parametrize("vocab_size", [4_096, 32_000])
@pytest.mark.parametrize("wanted", SIZES, ids=lambda wanted: f"{wanted:.3g}")
def test_every_size_has_a_shape_within_two_percent_that_divides(wanted: float, vocab_size: int) -> None:
    shape = find_shape(wanted, vocab_size)
    assert ModelConfig(**shape.model_dump()) == shape, "every bound of the schema holds"
    assert abs(count_parameters(shape).total / wanted - 1) <= TOLERANCE == 0.02
    for divided in (shape.num_attention_heads, shape.kv_heads, shape.intermediate_size):
        assert divided % 8 == 0
    assert shape.num_hidden_layers % 2 == 0
    assert shape.num_attention_heads % shape.kv_heads == 0
    assert shape.num_attention_heads * shape.head_size == shape.hidden_size
    assert 2.6 <= shape.intermediate_size / shape.hidden_size <= 4


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (8_030_261_248, (4096, 14336, 32, 32, 8, 128, False)),
        (70_553_706_496, (8192, 28672, 80, 64, 8, 128, False)),
    ],
)
def test_the_sizes_of_llama_3_have_its_shapes(size: int, shape: tuple[Any, ...]) -> None:
    found = find_shape(size, 128_256)
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert tuple(getattr(found, key) for key in (*keys, "head_dim", "tie_word_embeddings")) == shape
    assert count_parameters(found).total == size


def test_a_1b_has_the_widths_of_tinyllama() -> None:
    shape = find_shape(1e9, 32_000)
    assert (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads) == (2048, 5632, 32)


def test_small_models_tie_embedding_and_head_and_large_ones_group_heads() -> None:
    small, middle, large = (find_shape(size, 32_000) for size in (1e9, 2.5e9, 7e9))
    assert (small.tie_word_embeddings, middle.tie_word_embeddings, large.tie_word_embeddings) == (True, False, False)
    assert middle.num_key_value_heads == middle.num_attention_heads
    assert (large.num_key_value_heads, large.head_dim) == (8, 128)


def test_what_is_too_small_for_eight_heads_has_fewer_and_says_so() -> None:
    shape = find_shape(5e6, 32_000)
    assert abs(count_parameters(shape).total / 5e6 - 1) <= TOLERANCE
    assert shape.num_attention_heads == 2


@pytest.mark.parametrize(
    ("size", "vocab_size", "sentence"),
    [
        (3e6, 32_000, "3e+06 parameters have no Llama shape within 2% for a vocabulary of 32000; nearest: "),
        (2e7, 128_256, "nearest: 1.799e+07 or 2.551e+07 parameters"),
        (1e18, 32_000, "1e+18 parameters have no Llama shape within 2% for a vocabulary of 32000; nearest: "),
    ],
)
def test_a_size_without_a_shape_is_refused_with_the_nearest(size: float, vocab_size: int, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        find_shape(size, vocab_size)
    assert sentence in str(refused.value)


def test_the_nearest_sizes_that_a_refusal_names_do_have_a_shape() -> None:
    for nearest in (1.799e7, 2.551e7):
        assert abs(count_parameters(find_shape(nearest, 128_256)).total / nearest - 1) <= TOLERANCE
