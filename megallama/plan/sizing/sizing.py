"""How large a model and how much data one budget makes best, and what another split of it costs. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megallama.layout.scaling_laws import (
    DEFAULT_FIT,
    DEFAULT_SPREAD,
    FITS,
    FLOPS_PER_PARAMETER_AND_TOKEN,
    LossFit,
    PowerLaw,
)

# Up to here repeated tokens are nearly worth fresh ones (arXiv 2305.16264).
MOST_EPOCHS = 4
# Sizes below the optimum whose price is told, as shares of it.
SMALLER = (1 / 2, 1 / 4, 1 / 8)
# Four of five: the interval of the default fit's paper (arXiv 2404.10102), in standard errors of a normal law.
_STANDARD_ERRORS = 1.2816

Quantity = Literal["flops", "parameters", "tokens"]


@dataclass(frozen=True)
class Optimum:
    """What one fit holds best: parameters, tokens, and their training compute 6 N D in FLOPs."""

    fit: LossFit | PowerLaw
    parameters: float
    tokens: float

    @property
    def flops(self) -> float:
        """Training compute of this pair."""
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.parameters * self.tokens


@dataclass(frozen=True)
class Interval:
    """Where four of five refits to resampled data put a figure."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A size and its tokens beside the best of equal compute, by the default fit. Losses in nats per token."""

    parameters: float
    tokens: float
    best: Optimum

    @property
    def loss(self) -> float:
        """The loss of this pair."""
        return DEFAULT_FIT.loss(self.parameters, self.tokens)

    @property
    def best_loss(self) -> float:
        """The loss of the best pair."""
        return DEFAULT_FIT.loss(self.best.parameters, self.best.tokens)

    @property
    def penalty(self) -> float:
        """Loss above the best of equal compute."""
        return self.loss - self.best_loss

    @property
    def sufficient_compute(self) -> float:
        """The share of this compute with which the best split reaches this loss."""
        return DEFAULT_FIT.flops_for_loss(self.loss) / self.best.flops


@dataclass(frozen=True)
class Sizing:
    """The answer to one question: what was given, and the rest by every fit."""

    given: Quantity
    amount: float
    optima: tuple[Optimum, ...]
    """In the order of FITS."""
    parameters: Interval
    """The interval of the default's parameters; one point where they were given."""
    tokens: Interval
    """The interval of the default's tokens; one point where they were given."""

    @property
    def best(self) -> Optimum:
        """By the default fit."""
        return self.optima[FITS.index(DEFAULT_FIT)]

    @property
    def loss(self) -> float:
        """The loss of the default's optimum, in nats per token on the corpus of its fit."""
        return DEFAULT_FIT.loss(self.best.parameters, self.best.tokens)


def size(given: Quantity, amount: float) -> Sizing:
    """The compute-optimal rest of compute in FLOPs, parameters, or tokens; `amount` is above 0."""
    optima = tuple(_optimum(fit, given, amount) for fit in FITS)
    of_parameters, of_tokens = _intervals(given, optima[FITS.index(DEFAULT_FIT)])
    return Sizing(given, amount, optima, of_parameters, of_tokens)


def compare(parameters: float, tokens: float) -> Comparison:
    """What this pair costs against the best of equal compute."""
    flops = FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens
    return Comparison(parameters, tokens, _optimum(DEFAULT_FIT, "flops", flops))


def over_trained(best: Optimum, share: float) -> Comparison:
    """A model of `share` times the best size on 1 / share times the tokens: equal compute, higher loss."""
    return compare(share * best.parameters, best.tokens / share)


def repeats_too_often(tokens: float, unique_tokens: float) -> bool:
    """Whether training goes over its data more often than repeated tokens are worth."""
    return tokens > MOST_EPOCHS * unique_tokens


def _optimum(fit: LossFit | PowerLaw, given: Quantity, amount: float) -> Optimum:
    if given == "flops":
        return Optimum(fit, *fit.optimal_for_compute(amount))
    if given == "parameters":
        return Optimum(fit, amount, fit.optimal_tokens(amount))
    return Optimum(fit, fit.optimal_parameters(amount), amount)


def _intervals(given: Quantity, best: Optimum) -> tuple[Interval, Interval]:
    """The intervals of parameters and tokens: what was given is certain, the other has the spread of ln N* (C).

    At given compute ln N and ln D err by the same, opposed. At given N the curve ln N* (C), of slope a, is read the
    other way, which divides by a; at given D likewise by the slope 1 - a of ln D* (C).
    """
    error = _STANDARD_ERRORS * DEFAULT_SPREAD.at(best.flops)
    a = DEFAULT_FIT.parameters_over_compute
    of_parameters = {"flops": error, "parameters": 0.0, "tokens": error / (1 - a)}[given]
    of_tokens = {"flops": error, "parameters": error / a, "tokens": 0.0}[given]
    return _around(best.parameters, of_parameters), _around(best.tokens, of_tokens)


def _around(middle: float, error: float) -> Interval:
    """The interval whose logarithm is that of `middle` plus or minus `error`."""
    return Interval(middle * math.exp(-error), middle * math.exp(error))
