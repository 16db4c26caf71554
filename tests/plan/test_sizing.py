"""The three questions, their intervals, and the price of another split."""

from __future__ import annotations

import math

import pytest

from megallama.layout.scaling_laws import DEFAULT_FIT, FITS
from megallama.plan.sizing.sizing import Quantity, compare, over_trained, repeats_too_often, size


def test_the_default_answer_for_1e21_with_its_interval() -> None:
    sizing = size("flops", 1e21)
    assert sizing.best.fit is DEFAULT_FIT
    assert sizing.best.parameters == pytest.approx(2.778e9, rel=2e-4)
    assert sizing.best.tokens == pytest.approx(5.999e10, rel=2e-4)
    assert sizing.loss == pytest.approx(2.3052, abs=5e-5)
    # 80 % of 400 refits to resamples of the 240 published points lay within exp(+-0.108) of the middle.
    assert math.log(sizing.parameters.high / sizing.best.parameters) == pytest.approx(0.108, abs=0.005)
    assert math.log(sizing.best.tokens / sizing.tokens.low) == pytest.approx(0.108, abs=0.005)


@pytest.mark.parametrize(("flops", "half"), [(1e20, 0.051), (1e22, 0.159), (1e24, 0.270), (1e26, 0.382)])
def test_the_interval_over_compute_is_that_of_refits_to_resampled_data(flops: float, half: float) -> None:
    sizing = size("flops", flops)
    assert math.log(sizing.parameters.high / sizing.best.parameters) == pytest.approx(half, rel=0.05)


@pytest.mark.parametrize(("given", "amount"), [("flops", 1e22), ("parameters", 7e9), ("tokens", 2e12)])
def test_every_fit_answers_and_what_was_given_is_certain(given: Quantity, amount: float) -> None:
    sizing = size(given, amount)
    assert [optimum.fit for optimum in sizing.optima] == list(FITS)
    for optimum in sizing.optima:
        assert getattr(optimum, given) == pytest.approx(amount)
    for name in ("parameters", "tokens"):
        interval, middle = getattr(sizing, name), getattr(sizing.best, name)
        if name == given:
            assert interval.low == interval.high == amount
        else:
            assert interval.low < middle < interval.high


def test_the_interval_of_the_inverse_question_holds_the_same_laws() -> None:
    """The compute at the end of an interval is the one whose own interval ends at what was given."""
    of_size = size("parameters", 7e9)
    assert size("flops", 6 * 7e9 * of_size.tokens.high).parameters.low == pytest.approx(7e9, rel=0.02)
    of_tokens = size("tokens", 144e9)
    assert size("flops", 6 * of_tokens.parameters.high * 144e9).tokens.low == pytest.approx(144e9, rel=0.02)


def test_an_8b_on_15t_tokens_costs_five_hundredths_of_a_nat() -> None:
    pair = compare(8.03e9, 15e12)
    assert pair.loss == pytest.approx(2.0215, abs=5e-5)
    assert pair.best_loss == pytest.approx(1.9679, abs=5e-5)
    assert pair.penalty == pytest.approx(0.0536, abs=1e-4)
    assert pair.best.parameters == pytest.approx(81.2e9, rel=1e-3)
    assert pair.best.tokens == pytest.approx(1.48e12, rel=3e-3)


def test_the_compute_that_would_do_reaches_the_same_loss() -> None:
    pair = compare(8.03e9, 15e12)
    assert 0 < pair.sufficient_compute < 1
    cheaper = size("flops", pair.sufficient_compute * pair.best.flops)
    assert cheaper.loss == pytest.approx(pair.loss)


def test_smaller_models_cost_more_the_smaller_they_are_at_equal_compute() -> None:
    best = size("flops", 1e22).best
    half, quarter = over_trained(best, 1 / 2), over_trained(best, 1 / 4)
    assert 0 < half.penalty < quarter.penalty
    assert 6 * quarter.parameters * quarter.tokens == pytest.approx(1e22)
    assert quarter.tokens == pytest.approx(4 * best.tokens)


def test_data_may_repeat_four_times_and_no_more() -> None:
    assert not repeats_too_often(4e9, 1e9)
    assert repeats_too_often(4.01e9, 1e9)
