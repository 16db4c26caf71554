"""The learning rate over a run. Pure."""

from __future__ import annotations

import math

from megallama.config.schema import RunConfig, ScheduleConfig
from megallama.layout.budget import Seen, samples_at_step, schedule_batch, total_steps


def next_rate(config: RunConfig, seen: Seen) -> float:
    """Rate of the step after what is seen: by steps where the length of the run is in steps, else by sequences.

    By sequences a step of `schedule` stands for the batch that the run began with, so that another batch leaves the
    rate where it is in the data. Where the batch never changes, both are the same to the bit.
    """
    total, lr = total_steps(config, seen), config.optimizer.lr
    if isinstance(config.train.steps, int):
        return learning_rate(seen.step + 1, total, lr, config.schedule)
    done, end = (samples_at_step(config, step, seen) for step in (seen.step + 1, total))
    return learning_rate(done, end, lr, config.schedule, schedule_batch(config, seen))


def learning_rate(done: int, total: int, lr: float, schedule: ScheduleConfig, unit: float = 1) -> float:
    """Rate of the update after which `done` of `total` are done: steps, or whatever `unit` of make up a step.

    Warm-up rises linearly as lr * done / warmup_steps, so that the first update already moves and step warmup_steps,
    counted from 1, has the peak. From there `cosine` and `linear` fall to min_lr, which the last step has exactly;
    `wsd` (arXiv 2404.06395) holds the peak and falls linearly over the last decay_steps; `constant` holds it for good.
    Past the last step the rate stays what it was there.
    """
    warmup = schedule.warmup_steps
    if done <= warmup * unit:
        return lr * (done / unit) / warmup
    if schedule.kind == "constant":
        return lr
    fall_begins = max(warmup, 1) * unit
    if schedule.kind == "wsd":
        decay = schedule.decay_steps or max(1, total // (10 * unit))
        fall_begins = max(fall_begins, total - decay * unit)
    return _fallen(done, fall_begins, total, lr, schedule)


def _fallen(done: int, fall_begins: float, total: int, lr: float, schedule: ScheduleConfig) -> float:
    """The rate on the way down: the first update past `fall_begins` is below the peak, the last one at min_lr."""
    if done <= fall_begins:
        return lr
    if done >= total:
        return schedule.min_lr
    share = (done - fall_begins) / (total - fall_begins)  # of whole numbers: the same to the bit in every unit
    if schedule.kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return lr + (schedule.min_lr - lr) * share
