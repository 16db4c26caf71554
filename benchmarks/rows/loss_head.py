"""Row C2: the loss head alone, forward and backward, with a large vocabulary; contenders of `step.measure`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from contenders import apart, floor
from torch import Tensor, nn
from torch.nn import functional as F

from megallama.config.schema import RunConfig
from megallama.parallel.cross_entropy import linear_cross_entropy
from megallama.parallel.mesh import ALONE

NAMES = ("ours", "F.cross_entropy", "F.linear_cross_entropy", "cut-cross-entropy", floor.NAME)
RATE = 10.0
"""Of the gradient of the mean over thousands of positions."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, labels) -> the sum of the losses."""


def build(name: str, config: RunConfig, device: torch.device) -> Callable[[], float | Tensor]:
    """Forward and backward of one contender of NAMES over the tokens of a micro-batch; gives the mean loss.

    Both inputs follow their gradients, so that wrong ones show in the next loss.
    """
    draws = torch.Generator().manual_seed(config.train.seed)
    positions, width, vocabulary = floor.head_shape(config)
    if name == floor.NAME:
        return floor.run_all(list(floor.linear(positions, width, vocabulary, floor.drawing(config, device))))
    hidden = torch.randn(positions, width, generator=draws).to(device).requires_grad_()
    weight = nn.Parameter(0.02 * torch.randn(vocabulary, width, generator=draws).to(device))
    labels = torch.randint(vocabulary, (positions,), generator=draws).to(device)
    loss_of = losses()[name]()

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        loss = loss_of(hidden, weight, labels) / positions
        loss.backward()
        with torch.no_grad():
            for each in (hidden, weight):
                assert each.grad is not None
                each.sub_(each.grad, alpha=RATE)
        return loss.detach()

    return step


def losses() -> dict[str, Callable[[], Loss]]:
    """What makes each."""
    return {
        "ours": lambda: (
            lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, 0, weight.shape[0], ALONE)
        ),
        "F.cross_entropy": lambda: (
            lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
        ),
        "F.linear_cross_entropy": of_torch,
        "cut-cross-entropy": cut_cross_entropy,
    }


def of_torch() -> Loss:
    """In chunks, as torch itself picks them."""
    function: Any = F
    if not hasattr(function, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy, which is new in 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: function.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", options=options
    )


def cut_cross_entropy() -> Loss:
    """Its implementation by torch.compile: the other one is in Triton, which a CPU has not."""
    apart.found()
    import importlib.util

    # The package itself imports Triton, as far as it is installed.
    spec = importlib.util.find_spec("cut_cross_entropy")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("cut-cross-entropy is not installed")
    package = ModuleType("cut_cross_entropy")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["cut_cross_entropy"] = package
    from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy

    return lambda hidden, weight, labels: torch_compile_linear_cross_entropy(hidden, weight, labels, reduction="sum")
