"""How long a run is, and how much of it is done. Pure.

A length in tokens is one in sequences of the run's data.sequence_length: the first step with which as many are seen is
the last, whatever the batches were. So nothing here looks at how many steps that took. What was seen in sequences of
another length is counted anew when a run goes on (checkpoint/state.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megallama.layout.counts import count_parameters
from megallama.layout.scaling_laws import optimal_tokens

if TYPE_CHECKING:
    from megallama.config.schema import RunConfig


@dataclass(frozen=True)
class Seen:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Sequences consumed by them."""
    first_batch: float | None = None
    """Sequences of the first of them, whole unless their length has changed; None where it is to come, or not known."""
    stages: tuple[int, ...] = ()
    """The first sample of each stage of `data.mixture`, as far as those go that have begun."""


NOTHING_SEEN = Seen()


def total_tokens(config: RunConfig) -> int | None:
    """Tokens that end the run: train.tokens, or what `chinchilla` comes to; None where its length is in steps.

    The latter are the compute-optimal tokens for the whole model's parameters (arXiv 2404.10102).
    """
    if config.train.tokens is not None:
        return config.train.tokens
    if config.train.steps == "chinchilla":
        return math.ceil(optimal_tokens(count_parameters(config.model).total))
    return None


def total_steps(config: RunConfig, seen: Seen = NOTHING_SEEN) -> int:
    """Optimizer steps of the run, those that are done and those that are left at its batch size.

    With a length in tokens that has been reached, these are the steps that are done.
    """
    if isinstance(config.train.steps, int):
        return config.train.steps
    return seen.step + max(0, -(-(_total_samples(config) - seen.samples) // config.train.global_batch_size))


def samples_at_step(config: RunConfig, step: int, seen: Seen = NOTHING_SEEN) -> int:
    """Sequences consumed when `step` steps are done, at the batches of the run from `seen` on."""
    return seen.samples + (step - seen.step) * config.train.global_batch_size


def run_samples(config: RunConfig, seen: Seen = NOTHING_SEEN) -> int:
    """Sequences that the run has consumed at its end."""
    return samples_at_step(config, total_steps(config, seen), seen)


def stage_samples(config: RunConfig, seen: Seen = NOTHING_SEEN) -> tuple[int, ...]:
    """The first sample of each stage of `data.mixture`; none without one.

    Stages that have begun stay where they began, whatever the batches are now; others begin by the batches to come.
    """
    steps = [stage.from_step for stage in config.data.stages]
    begun = seen.stages[: sum(step < seen.step for step in steps)]
    return (*begun, *(samples_at_step(config, step, seen) for step in steps[len(begun) :]))


def schedule_batch(config: RunConfig, seen: Seen) -> float:
    """Sequences in a step of `schedule`'s keys, where the length is in tokens: those of the run's first step."""
    if seen.first_batch is None and seen.step:
        return max(1, seen.samples // seen.step)  # saved before it was recorded; exact where the batch never changed
    return seen.first_batch or config.train.global_batch_size


def schedule_steps(config: RunConfig, seen: Seen = NOTHING_SEEN) -> int:
    """Steps that the run has in the unit of `schedule`'s keys."""
    if isinstance(config.train.steps, int):
        return config.train.steps
    return int(-(-_total_samples(config) // schedule_batch(config, seen)))


def planned_tokens(config: RunConfig, given: float | None = None) -> float:
    """Tokens that a plan reckons with: `given`, else train.tokens, else those of all steps."""
    if given is not None:
        return given
    return config.train.tokens or total_steps(config) * config.tokens_per_step


def _total_samples(config: RunConfig) -> int:
    tokens = total_tokens(config)
    assert tokens is not None
    return -(-tokens // config.data.sequence_length)
