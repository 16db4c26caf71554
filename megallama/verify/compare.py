"""What a run left behind, compared with what one process left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint.tensors import EXP_AVG, Stored, is_weight, moment_name
from megallama.config.schema import RunConfig
from megallama.run_dir.events import standing_events


@dataclass(frozen=True)
class Trace:
    """Losses and gradient norms by step, the first gradient as the optimizer saw it, and the last weights."""

    losses: list[float]
    evaluations: list[float]
    """The loss of each split before the first step and after the last."""
    norms: list[float]
    first_gradient: dict[str, Tensor]
    """Of weights that are not frozen."""
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Bounds:
    """The largest relative differences that pass."""

    loss: float
    first_norm: float
    gradient: float
    norm: float
    update: float


# fp32 differs by the order of sums alone, bf16 by its 8 bits of mantissa. Adam's first updates are signs of gradients,
# so weights move apart wherever a gradient is near zero: they are held to the length of the way they went.
BOUNDS = {
    "fp32": Bounds(loss=1e-6, first_norm=1e-5, gradient=1e-5, norm=1e-3, update=1e-3),
    # Three times the worst of 18 comparisons at 12 layouts, tied and with fewer heads; the loss eight times.
    "bf16": Bounds(loss=5e-4, first_norm=2e-3, gradient=2.5e-2, norm=2.5e-2, update=3e-1),
}
FP8 = Bounds(loss=2e-3, first_norm=2.5e-2, gradient=2e-1, norm=5e-2, update=6e-1)
"""Of train.matmul=fp8: twice the worst of 9 layouts. Each rank scales what it has of a matrix by itself."""


@dataclass(frozen=True)
class Difference:
    """Relative differences of a layout from one process, each the worst over steps or parameters."""

    loss: float
    first_norm: float
    gradient: float
    worst_gradient: str
    norm: float
    update: float

    def beyond(self, bounds: Bounds) -> list[str]:
        """The measures that do not pass."""
        return [name for name in vars(bounds) if not getattr(self, name) <= getattr(bounds, name)]


def read_trace(config: RunConfig) -> Trace:
    """The trace of a finished run that saved after every step.

    After one step Adam's first moment is (1 - beta1) times the clipped gradient, so the gradient is read from the
    checkpoint, behind every reduction and the clip, at any layout and ZeRO stage alike.
    """
    run_dir, beta1 = Path(config.run.dir), config.optimizer.betas[0]
    events = events_of(run_dir, "train")
    folder = run_dir / "checkpoints"
    first = read_tensors(folder / "step_00000001")
    last = read_tensors(folder / f"step_{events[-1]['step']:08d}")
    names = [name for name in last if is_weight(name)]
    return Trace(
        losses=train_losses(run_dir),
        evaluations=[_number(event["loss"]) for event in events_of(run_dir, "eval")],
        norms=[_number(event["grad_norm"]) for event in events],
        first_gradient={
            name: first[moment] / (1 - beta1) for name in names if (moment := moment_name(EXP_AVG, name)) in first
        },
        weights={name: last[name] for name in names},
    )


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a run of one kind that stand, in order."""
    return [event for event in standing_events(run_dir) if event["event"] == kind]


def train_losses(run_dir: Path) -> list[float]:
    """The losses of its steps."""
    return [_number(event["loss"]) for event in events_of(run_dir, "train")]


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    stored = Stored(checkpoint)
    return {name: torch.from_numpy(stored.read(name)) for name in stored.shapes}


def compare(trace: Trace, reference: Trace, start: Mapping[str, Tensor]) -> Difference:
    """`trace` against `reference`, which began at the weights `start`."""
    gradients = {
        name: relative(trace.first_gradient[name] - gradient, gradient)
        for name, gradient in reference.first_gradient.items()
    }
    worst = max(gradients, key=lambda name: _nan_is_worst(gradients[name]))
    frozen = reference.weights.keys() - reference.first_gradient.keys()
    updates = (
        float(not torch.equal(trace.weights[name], weight))
        if name in frozen
        else relative(trace.weights[name] - weight, weight - start[name])
        for name, weight in reference.weights.items()
    )
    return Difference(
        loss=worst_difference([*trace.losses, *trace.evaluations], [*reference.losses, *reference.evaluations]),
        first_norm=worst_difference(trace.norms[:1], reference.norms[:1]),
        gradient=gradients[worst],
        worst_gradient=worst,
        norm=worst_difference(trace.norms, reference.norms),
        update=max(updates, key=_nan_is_worst),
    )


def worst_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest |a / b - 1| of pairs; what is NaN is the largest."""
    return max((abs(a / b - 1) for a, b in zip(found, expected, strict=True)), key=_nan_is_worst)


def relative(difference: Tensor, whole: Tensor) -> float:
    """|difference| / |whole|, in fp64."""
    return float(difference.double().norm() / whole.double().norm())


def _number(value: float | None) -> float:
    """What is not finite is null in metrics.jsonl."""
    return float("nan") if value is None else value


def _nan_is_worst(value: float) -> float:
    return value if value == value else float("inf")
