"""Batch sizes and learning rates, as their sources have them for sizes that they name."""

from __future__ import annotations

import pytest

from megallama.plan.sizing.batch import Range, batch_tokens, learning_rates


def value(found: Range, name: str) -> float:
    [advice] = [advice for advice in found.advice if advice.name.startswith(name)]
    return advice.value


@pytest.mark.parametrize(("parameters", "batch", "rate"), [(1e9, 1.44e6, 1.12e-3), (7e9, 5.3e6, 5.9e-4)])
def test_the_ladder_law_at_1b_and_7b(parameters: float, batch: float, rate: float) -> None:
    assert value(batch_tokens(parameters, parameters, 20 * parameters), "OLMo-core") == pytest.approx(batch, rel=5e-3)
    assert value(learning_rates(parameters, parameters, 1e9), "OLMo-core") == pytest.approx(rate, rel=1e-2)


def test_step_law_leaves_the_tables_out_and_grows_with_data() -> None:
    # 1.79 * 1e9^-0.713 * 1e11^0.307 and 0.58 * 1e11^0.571.
    assert value(learning_rates(1.1e9, 1e9, 1e11), "Step Law") == pytest.approx(1.631e-3, rel=1e-3)
    assert value(batch_tokens(1.1e9, 1e9, 1e11), "Step Law") == pytest.approx(1.108e6, rel=1e-3)
    assert value(batch_tokens(1.1e9, 2e9, 1e11), "Step Law") == value(batch_tokens(1.1e9, 1e9, 1e11), "Step Law")


def test_deepseek_at_the_compute_of_llama_2_7b() -> None:
    # 0.3118 * 8.4e22^-0.125 = 4.2e-4 and 0.2920 * 8.4e22^0.3271 = 9.2e6.
    assert value(learning_rates(7e9, 7e9, 2e12), "DeepSeek") == pytest.approx(4.26e-4, rel=1e-2)
    assert value(batch_tokens(7e9, 7e9, 2e12), "DeepSeek") == pytest.approx(9.15e6, rel=1e-2)


@pytest.mark.parametrize(
    ("parameters", "name", "batch", "rate"),
    [
        (1e9, "TinyLlama", 2e6, 4e-4),
        (7e9, "Llama 2 7B", 4e6, 3e-4),
        (15e9, "Llama 2 13B", 4e6, 3e-4),
        (70e9, "Llama 2 70B", 4e6, 1.5e-4),
        (1e12, "Llama 3.1 405B", 16e6, 8e-5),
    ],
)
def test_the_run_nearest_in_size_is_named(parameters: float, name: str, batch: float, rate: float) -> None:
    assert value(batch_tokens(parameters, parameters, 1e12), name) == batch
    assert value(learning_rates(parameters, parameters, 1e12), name) == rate


def test_the_laws_disagree_so_the_answer_is_a_range_with_a_source_for_each() -> None:
    for found in (batch_tokens(7e9, 6.5e9, 2e12), learning_rates(7e9, 6.5e9, 2e12)):
        assert found.low == min(advice.value for advice in found.advice)
        assert found.high == max(advice.value for advice in found.advice)
        assert len(found.advice) == 4 and all(advice.source for advice in found.advice)
    assert batch_tokens(7e9, 6.5e9, 2e12).high > 2 * batch_tokens(7e9, 6.5e9, 2e12).low
