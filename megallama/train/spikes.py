"""Steps that stand out of those before them, found on the device: nothing waits for the answer.

The rule is that of OLMo's skip-step optimizer (OLMo 2, arXiv 2501.00656; `SkipStepOptimizer` of OLMo-core), but for
what it compares with: a step that was skipped is not remembered, so that several in a row are all skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Reason = Literal["loss", "gradient"]
REASONS: tuple[Reason, Reason] = ("loss", "gradient")
"""What may stand out, in the order of `Spikes.judge`."""
LEAST_DEVIATION = 0.01
"""Of the mean: where a run hardly varies, what is usual elsewhere would stand out."""


class Spikes:
    """Loss and gradient norm of the last `window` updates, and whether the next ones are far above them."""

    def __init__(self, deviations: float, window: int, device: torch.device) -> None:
        self._deviations, self._window = deviations, window
        self._values = torch.zeros(len(REASONS), window, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._places = torch.arange(window, device=device)

    def remember(self, losses: Sequence[float], norms: Sequence[float]) -> None:
        """Begin anew with those of earlier updates, the newest last."""
        kept = torch.tensor([losses[-self._window :], norms[-self._window :]], dtype=torch.float64)
        self._values.zero_()
        self._values[:, : kept.shape[1]] = kept
        self._count.fill_(kept.shape[1])

    @property
    def remembered(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Losses and norms, the newest last; waits for the device."""
        count = int(self._count)
        order = [place % self._window for place in range(max(0, count - self._window), count)]
        losses, norms = self._values[:, order].tolist()
        return tuple(losses), tuple(norms)

    @property
    def bounds(self) -> Tensor:
        """[2], above which loss and norm stand out; infinite while half of the window is not yet there."""
        there = self._places < self._count
        count = there.sum().clamp(min=1)
        mean = (self._values * there).sum(1) / count
        variance = ((self._values - mean[:, None]).square() * there).sum(1) / count
        deviation = torch.maximum(variance.sqrt(), LEAST_DEVIATION * mean.abs())
        known = self._count >= self._window // 2
        return torch.where(known, mean + self._deviations * deviation, torch.inf)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """[2], bool: which of the two stands out, or is no number. A step of which neither does is remembered."""
        values = torch.stack([loss.double(), norm.double()])
        out = ~(values <= self.bounds) | ~torch.isfinite(values)
        applied = ~out.any()
        slot = self._places == self._count % self._window
        self._values = torch.where(slot & applied, values[:, None], self._values)
        self._count += applied
        return out
