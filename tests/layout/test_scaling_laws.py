"""Optima and losses of the published fits, as their papers or a recomputation have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.layout.budget import total_steps
from megallama.layout.scaling_laws import (
    BESIROGLU,
    DEFAULT_FIT,
    FITS,
    HOFFMANN_1,
    HOFFMANN_2,
    LLAMA_3,
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


@pytest.mark.parametrize(("flops", "ratio"), [(1e20, 22.9), (1e22, 20.4), (5.76e23, 18.4), (3.8e25, 16.5)])
def test_tokens_per_parameter_over_compute(flops: float, ratio: float) -> None:
    parameters, tokens = BESIROGLU.optimal_for_compute(flops)
    assert tokens / parameters == pytest.approx(ratio, rel=4e-3)


def test_the_fits_are_the_four_that_are_printed_and_the_first_is_the_default() -> None:
    assert (BESIROGLU, HOFFMANN_1, HOFFMANN_2, LLAMA_3) == FITS
    assert DEFAULT_FIT is FITS[0]


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
    # All rows are C = 6 N D, but for 67B, whose tokens are printed to two digits.
    assert 6 * parameters * tokens == pytest.approx(flops, rel=0.048 if parameters == 67e9 else 0.012)
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
    assert BESIROGLU.parameters_over_compute == pytest.approx(0.513, abs=5e-4)


def test_the_legend_of_llama_3s_figure_gives_the_tokens_that_its_paper_states() -> None:
    """402B parameters on 16.55T tokens for 3.8e25 FLOPs."""
    parameters, tokens = LLAMA_3.optimal_for_compute(3.8e25)
    assert parameters == pytest.approx(389e9, rel=2e-3)
    assert tokens == pytest.approx(16.3e12, rel=3e-3)


def test_the_rule_of_thumb_is_approach_1_to_a_few_percent() -> None:
    parameters, tokens = HOFFMANN_1.optimal_for_compute(120 * 70e9**2)
    assert parameters == pytest.approx(70e9, rel=0.02)
    assert tokens == pytest.approx(20 * 70e9, rel=0.04)


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
