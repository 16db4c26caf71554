"""The constant that measured steps give: at which share of the peak a plan predicts them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from megallama.errors import UserError
from megallama.plan.hardware import Gpu
from megallama.plan.time.step_time import step_time_at
from megallama.plan.time.workload import Workload

_LOWEST = 1e-3


@dataclass(frozen=True)
class MeasuredStep:
    """A step and the seconds that it took."""

    work: Workload
    gpu: Gpu
    seconds: float


def fitted_efficiency(steps: Sequence[MeasuredStep]) -> float:
    """The share of the peak at which predicted over measured seconds are 1 in the geometric mean.

    UserError if that is not between 0.001 and 1: steps were faster than at the peak, or hardly moved.
    """
    if _excess(steps, 1.0) > 0 or _excess(steps, _LOWEST) < 0:
        seconds = ", ".join(f"{step.seconds:.4g}" for step in steps)
        raise UserError(f"steps of {seconds} s fit no efficiency from {_LOWEST:g} to 1; check the peak and the links")
    low, high = _LOWEST, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _excess(steps, middle) > 0 else (low, middle)
    return low


def _excess(steps: Sequence[MeasuredStep], efficiency: float) -> float:
    """Above 0 where predicted steps are too slow; falls as the efficiency rises."""
    return sum(log(step_time_at(step.work, step.gpu, efficiency).total / step.seconds) for step in steps)
