"""How long a run is. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megallama.plan.params import count_parameters
from megallama.plan.scaling import optimal_tokens

if TYPE_CHECKING:
    from megallama.config.schema import RunConfig


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the run, over which the schedule spans: train.steps, or what `chinchilla` comes to.

    That is the compute-optimal tokens for the whole model's parameters (arXiv 2404.10102), in steps, rounded up.
    """
    if config.train.steps != "chinchilla":
        return config.train.steps
    return math.ceil(optimal_tokens(count_parameters(config.model).total) / config.tokens_per_step)
