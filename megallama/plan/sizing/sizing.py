"""How large a model and how much data one budget makes best, and what another split of it costs. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megallama.layout.scaling_laws import DEFAULT_FIT, FITS, FLOPS_PER_PARAMETER_AND_TOKEN, LossFit, PowerLaw

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


def optima(given: Quantity, amount: float) -> list[Optimum]:
    """The compute-optimal rest of compute in FLOPs, parameters, or tokens, by every fit; the first is the default."""
    return [_optimum(fit, given, amount) for fit in FITS]


def compare(parameters: float, tokens: float) -> tuple[Optimum, float]:
    """The best of equal compute by the default fit, and the loss of this pair above it in nats per token."""
    best = _optimum(DEFAULT_FIT, "flops", FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens)
    return best, DEFAULT_FIT.loss(parameters, tokens) - DEFAULT_FIT.loss(best.parameters, best.tokens)


def _optimum(fit: LossFit | PowerLaw, given: Quantity, amount: float) -> Optimum:
    if given == "flops":
        return Optimum(fit, *fit.optimal_for_compute(amount))
    if given == "parameters":
        return Optimum(fit, amount, fit.optimal_tokens(amount))
    return Optimum(fit, fit.optimal_parameters(amount), amount)


@dataclass(frozen=True)
class Recipe:
    """The peak learning rate of AdamW and the tokens of a step that a published run took."""

    name: str
    parameters: float
    learning_rate: float
    batch_tokens: float
    source: str


RECIPES = (
    Recipe("TinyLlama 1.1B", 1.10e9, 4e-4, 2e6, "repository TinyLlama, README"),
    Recipe("Llama 2 7B", 6.74e9, 3e-4, 4e6, "repository llama-models, model card of Llama 2"),
    Recipe("Llama 2 13B", 13.0e9, 3e-4, 4e6, "repository llama-models, model card of Llama 2"),
    Recipe("Llama 2 70B", 69.0e9, 1.5e-4, 4e6, "repository llama-models, model card of Llama 2"),
    # The batch after 2.87e12 tokens; it began at 4e6.
    Recipe("Llama 3.1 405B", 405.9e9, 8e-5, 16e6, "arXiv 2407.21783, section 3.4.1"),
)


def nearest_recipe(parameters: float) -> Recipe:
    """That of the run nearest in size."""
    return min(RECIPES, key=lambda recipe: abs(math.log(recipe.parameters / parameters)))
