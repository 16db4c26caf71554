"""Optima and losses of the published fits, as their papers or a recomputation have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.plan.budget import total_steps
from megallama.plan.scaling import (
    BESIROGLU,
    DEFAULT_FIT,
    FITS,
    HOFFMANN_1,
    HOFFMANN_2,
    HOFFMANN_3,
    LossFit,
    PowerLaw,
    optimal_tokens,
)

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(("parameters", "ratio"), [(1e9, 22.70), (7e9, 20.63), (13e9, 20.01), (70e9, 18.42)])
def test_tokens_per_parameter_of_the_default_fit(parameters: float, ratio: float) -> None:
    assert optimal_tokens(parameters) / parameters == pytest.approx(ratio, abs=0.005)


def test_optimum_of_the_default_fit_at_1e21() -> None:
    parameters, tokens = DEFAULT_FIT.optimal_for_compute(1e21)
    assert parameters == pytest.approx(2.778e9, rel=2e-4)
    assert tokens == pytest.approx(5.999e10, rel=2e-4)
    assert DEFAULT_FIT.loss(parameters, tokens) == pytest.approx(2.3052, abs=5e-5)


def test_over_training_an_8b_costs_what_it_should() -> None:
    assert DEFAULT_FIT.loss(8.03e9, 15e12) == pytest.approx(2.0215, abs=5e-5)
    parameters, tokens = DEFAULT_FIT.optimal_for_compute(6 * 8.03e9 * 15e12)
    assert parameters == pytest.approx(81.2e9, rel=1e-3)
    assert tokens == pytest.approx(1.48e12, rel=3e-3)
    assert DEFAULT_FIT.loss(parameters, tokens) == pytest.approx(1.9679, abs=5e-5)


@pytest.mark.parametrize(
    ("fit", "ratios"), [(HOFFMANN_3, (40.1, 62.6, 92.7, 139)), (BESIROGLU, (22.9, 20.4, 18.4, 16.5))]
)
def test_tokens_per_parameter_over_compute(fit: LossFit | PowerLaw, ratios: tuple[float, ...]) -> None:
    assert fit in FITS
    for flops, ratio in zip((1e20, 1e22, 5.76e23, 3.8e25), ratios, strict=True):
        parameters, tokens = fit.optimal_for_compute(flops)
        assert tokens / parameters == pytest.approx(ratio, rel=4e-3)


@pytest.mark.parametrize(
    ("parameters", "flops", "tokens"),
    [
        (400e6, 1.92e19, 8.0e9),
        (1e9, 1.21e20, 20.2e9),
        (10e9, 1.23e22, 205.1e9),
        (67e9, 5.76e23, 1.5e12),
        (175e9, 3.85e24, 3.7e12),
        (280e9, 9.90e24, 5.9e12),
        (520e9, 3.43e25, 11.0e12),
        (1e12, 1.27e26, 21.2e12),
        (10e12, 1.30e28, 216.2e12),
    ],
)
def test_approach_1_follows_table_3(parameters: float, flops: float, tokens: float) -> None:
    # One power law with the exponent printed to two digits, over four decades of size; the tokens of 67B are rounded.
    best, data = HOFFMANN_1.optimal_for_compute(flops)
    assert best == pytest.approx(parameters, rel=0.06)
    assert data == pytest.approx(tokens, rel=0.07)


@pytest.mark.parametrize(
    ("parameters", "flops", "tokens"),
    [(400e6, 1.84e19, 7.7e9), (1e9, 1.20e20, 20.0e9), (10e9, 1.32e22, 219.5e9), (67e9, 6.88e23, 1.7e12)],
)
def test_approach_2_follows_table_a3(parameters: float, flops: float, tokens: float) -> None:
    best, data = HOFFMANN_2.optimal_for_compute(flops)
    # The exponent is printed to two digits.
    assert best == pytest.approx(parameters, rel=0.04)
    assert data == pytest.approx(tokens, rel=0.04)


def test_exponents_are_those_of_table_2() -> None:
    assert (HOFFMANN_1.parameters_over_compute, HOFFMANN_2.parameters_over_compute) == (0.50, 0.49)
    assert HOFFMANN_3.parameters_over_compute == pytest.approx(0.452, abs=5e-4)
    assert BESIROGLU.parameters_over_compute == pytest.approx(0.513, abs=5e-4)


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: fit.name)
def test_the_three_questions_have_one_answer(fit: LossFit | PowerLaw) -> None:
    parameters, tokens = fit.optimal_for_compute(1e22)
    assert 6 * parameters * tokens == pytest.approx(1e22)
    assert fit.optimal_tokens(parameters) == pytest.approx(tokens)
    assert fit.optimal_parameters(tokens) == pytest.approx(parameters)


def test_the_optimum_beats_its_neighbours_at_equal_compute() -> None:
    parameters, tokens = DEFAULT_FIT.optimal_for_compute(1e21)
    best = DEFAULT_FIT.loss(parameters, tokens)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert DEFAULT_FIT.loss(factor * parameters, tokens / factor) > best


def test_chinchilla_steps_are_the_fewest_that_reach_the_optimum() -> None:
    config = load_config(CONFIGS / "8b.yaml")
    steps = total_steps(config)
    wanted = optimal_tokens(8_030_261_248)
    assert (steps - 1) * config.tokens_per_step < wanted <= steps * config.tokens_per_step
    assert total_steps(load_config(CONFIGS / "7b.yaml")) == 300_000
