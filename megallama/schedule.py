"""The learning rate over steps. Pure."""

from __future__ import annotations

import math

from megallama.config.schema import ScheduleConfig


def learning_rate(step: int, total_steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """Rate of the update at `step`, counted from 0, of `total_steps`.

    Warm-up rises linearly as lr * (step + 1) / warmup_steps, so that the first update already moves and step
    warmup_steps - 1 has the peak. From there `cosine` and `linear` fall to min_lr, which the last step has exactly;
    `wsd` (arXiv 2404.06395) holds the peak and falls linearly over the last decay_steps; `constant` holds it for good.
    Past the last step the rate stays what it was there.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule.kind == "constant":
        return lr
    fall_begins = max(warmup, 1)
    if schedule.kind == "wsd":
        decay = schedule.decay_steps or max(1, total_steps // 10)
        fall_begins = max(fall_begins, total_steps - decay)
    return _fallen(step, fall_begins, total_steps, lr, schedule)


def _fallen(step: int, fall_begins: int, total_steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """The rate on the way down: the first step below the peak is `fall_begins`, the last step of the run has min_lr."""
    if step < fall_begins:
        return lr
    if step >= total_steps - 1:
        return schedule.min_lr
    share = (step - fall_begins + 1) / (total_steps - fall_begins)
    if schedule.kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return lr + (schedule.min_lr - lr) * share
