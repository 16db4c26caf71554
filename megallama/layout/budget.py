"""How long a run is, how much of it is done, and how many sequences each of its steps takes. Pure.

A length in tokens is one in sequences of the run's data.sequence_length: the first step with which as many are seen is
the last, whatever the batches were. So nothing here looks at how many steps that took. What was seen in sequences of
another length is counted anew when a run goes on (checkpoint/state.py).

The batch of a step depends on the position where it begins alone: it is that of the first stage of train.batch_ramp
whose tokens are not seen by then (arXiv 2407.21783, section 3.4.1).

A position counts the samples that were trained on: what a run passes over in the data is no part of its length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
    passed_over: tuple[tuple[int, int], ...] = ()
    """Ranges [first, end) of samples, in the order of the data, that are left out."""


NOTHING_SEEN = Seen()


def batch_at(config: RunConfig, samples: int) -> int:
    """Sequences of the step that begins when `samples` are consumed."""
    seen = samples * config.data.sequence_length
    reached = (stage.global_batch_size for stage in config.train.batch_ramp if seen < stage.until)
    return next(reached, config.train.global_batch_size)


def with_batch(config: RunConfig, batch: int) -> RunConfig:
    """The run as it is in the steps of `batch` sequences."""
    train = config.train.model_copy(update={"global_batch_size": batch, "batch_ramp": ()})
    return config.model_copy(update={"train": train})


def batches_to(config: RunConfig, end: int, samples: int = 0) -> Iterator[tuple[int, int]]:
    """(sequences of a step, how many such steps) from the position `samples` on, the fewest that reach `end`."""
    length, train = config.data.sequence_length, config.train
    ends = [(stage.global_batch_size, -(-stage.until // length)) for stage in train.batch_ramp]
    for batch, stage_end in [*ends, (train.global_batch_size, end)]:
        steps = -(-(min(stage_end, end) - samples) // batch)
        if steps > 0:
            yield batch, steps
            samples += steps * batch


def batches_of(config: RunConfig, tokens: float) -> list[tuple[int, int]]:
    """(sequences of a step, how many such steps) of a run of so many tokens."""
    return list(batches_to(config, math.ceil(tokens / config.data.sequence_length)))


def steps_words(config: RunConfig, tokens: float) -> str:
    """The arithmetic of the steps that so many tokens take, for a plan."""
    if not config.train.batch_ramp:
        return f"{tokens:.4g} tokens / {config.tokens_per_step}, up"
    return " + ".join(f"{steps} of {batch}" for batch, steps in batches_of(config, tokens)) + " sequences"


def samples_at_step(config: RunConfig, step: int, seen: Seen = NOTHING_SEEN) -> int:
    """Sequences consumed after `step` steps, of a run that is as far as `seen`, with as many steps or fewer."""
    left, samples = step - seen.step, seen.samples
    assert left >= 0, (step, seen)
    last = samples + left * config.train.global_batch_size  # the largest of all batches
    for batch, steps in batches_to(config, last, samples):
        done = min(steps, left)
        left, samples = left - done, samples + done * batch
    return samples


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
    """Optimizer steps of the run, those that are done and those that are left at its batch sizes.

    With a length in tokens that has been reached, these are the steps that are done.
    """
    if isinstance(config.train.steps, int):
        return config.train.steps
    return seen.step + sum(steps for _, steps in batches_to(config, _total_samples(config), seen.samples))


def run_samples(config: RunConfig, seen: Seen = NOTHING_SEEN) -> int:
    """Sequences that the run has consumed at its end, which may be behind it."""
    return samples_at_step(config, max(total_steps(config, seen), seen.step), seen)


def stage_samples(config: RunConfig, seen: Seen = NOTHING_SEEN) -> tuple[int, ...]:
    """The first sample of each stage of `data.mixture`; none without one.

    Stages that have begun stay where they began, whatever the batches are now; others begin by the batches to come.
    """
    steps = [stage.from_step for stage in config.data.stages]
    begun = seen.stages[: len(steps)]
    left = steps[len(begun) :]  # behind `seen` in a run of other data alone, which is refused
    return (*begun, *(samples_at_step(config, max(step, seen.step), seen) if step else 0 for step in left))


def begun_stages(config: RunConfig, seen: Seen) -> int:
    """How many stages of `data.mixture` a run that is as far as `seen` has read from, the first included.

    One that went back and passed over samples comes to a stage before the step that the stage names.
    """
    return max(len(seen.stages), sum(stage.from_step < max(seen.step, 1) for stage in config.data.stages))


def schedule_batch(config: RunConfig, seen: Seen) -> float:
    """Sequences in a step of `schedule`'s keys, where the length is in tokens: those of the run's first step."""
    if seen.first_batch is None and seen.step:
        return max(1, seen.samples // seen.step)  # saved before it was recorded; exact where the batch never changed
    return seen.first_batch or batch_at(config, seen.samples)


def schedule_steps(config: RunConfig, seen: Seen = NOTHING_SEEN) -> int:
    """Steps that the run has in the unit of `schedule`'s keys."""
    if isinstance(config.train.steps, int):
        return config.train.steps
    return int(-(-_total_samples(config) // schedule_batch(config, seen)))


def place(sample: int, passed_over: Sequence[tuple[int, int]]) -> int:
    """The number in the order of the data of sample `sample` of a run that passed over these [first, end), in order."""
    for first, end in passed_over:
        if sample >= first:
            sample += end - first
    return sample


def united(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same numbers as ranges in order that neither touch nor overlap."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return tuple(found)


def planned_tokens(config: RunConfig, given: float | None = None) -> float:
    """Tokens that a plan reckons with: `given`, else train.tokens, else those of all steps."""
    if given is not None:
        return given
    return config.train.tokens or samples_at_step(config, total_steps(config)) * config.data.sequence_length


def _total_samples(config: RunConfig) -> int:
    tokens = total_tokens(config)
    assert tokens is not None
    return -(-tokens // config.data.sequence_length)
