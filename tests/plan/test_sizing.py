"""The three questions, the price of another split, and where to begin."""

from __future__ import annotations

import pytest

from megallama.layout.scaling_laws import DEFAULT_FIT, FITS
from megallama.plan.sizing.sizing import Quantity, compare, nearest_recipe, optima


def test_the_default_answer_for_1e21() -> None:
    best = optima("flops", 1e21)[0]
    assert best.fit is DEFAULT_FIT
    assert best.parameters == pytest.approx(2.778e9, rel=2e-4)
    assert best.tokens == pytest.approx(5.999e10, rel=2e-4)


@pytest.mark.parametrize(("given", "amount"), [("flops", 1e22), ("parameters", 7e9), ("tokens", 2e12)])
def test_every_fit_answers_every_question(given: Quantity, amount: float) -> None:
    found = optima(given, amount)
    assert [optimum.fit for optimum in found] == list(FITS)
    for optimum in found:
        assert getattr(optimum, given) == pytest.approx(amount)


def test_an_8b_on_15t_tokens_costs_five_hundredths_of_a_nat() -> None:
    best, penalty = compare(8.03e9, 15e12)
    assert DEFAULT_FIT.loss(8.03e9, 15e12) == pytest.approx(2.0215, abs=5e-5)
    assert penalty == pytest.approx(0.0536, abs=1e-4)
    assert best.parameters == pytest.approx(81.2e9, rel=1e-3)
    assert best.tokens == pytest.approx(1.48e12, rel=3e-3)


def test_the_best_split_costs_nothing_above_itself() -> None:
    best = optima("flops", 1e22)[0]
    assert best.flops == pytest.approx(1e22)
    _, penalty = compare(best.parameters, best.tokens)
    assert penalty == pytest.approx(0, abs=1e-9)


def test_smaller_models_cost_more_the_smaller_they_are_at_equal_compute() -> None:
    best = optima("flops", 1e22)[0]
    (_, half), (_, quarter) = (compare(best.parameters / times, best.tokens * times) for times in (2, 4))
    assert 0 < half < quarter


@pytest.mark.parametrize(
    ("parameters", "name", "batch", "rate"),
    [
        (1e9, "TinyLlama 1.1B", 2e6, 4e-4),
        (7e9, "Llama 2 7B", 4e6, 3e-4),
        (15e9, "Llama 2 13B", 4e6, 3e-4),
        (70e9, "Llama 2 70B", 4e6, 1.5e-4),
        (1e12, "Llama 3.1 405B", 16e6, 8e-5),
    ],
)
def test_the_recipe_is_that_of_the_run_nearest_in_size(parameters: float, name: str, batch: float, rate: float) -> None:
    found = nearest_recipe(parameters)
    assert (found.name, found.batch_tokens, found.learning_rate) == (name, batch, rate)
