"""How large the output of each decoder layer is, and the gradient of the loss by it, in the step at hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megallama.train.run import Run


@dataclass
class LayerNorms:
    """Of each decoder layer of the model; the same on every rank, and at every layout up to rounding."""

    activation_rms: list[float]
    """Root of the mean square of its output."""
    gradient_norm: list[float]
    """Norm of the gradient of the loss, a mean over the global batch, by its output."""


@contextmanager
def layer_norms(run: Run) -> Iterator[LayerNorms]:
    """Filled at the end with what the forwards and backwards inside have made; every rank must call it.

    Hooks, and one all-reduce. Of a forward without backward the gradients are 0.
    """
    found = LayerNorms([], [])
    sums = torch.zeros(3, run.config.model.num_hidden_layers, dtype=torch.float64, device=run.mesh.device)
    add_output = torch.compiler.disable(_add_output)  # compiled layers would be compiled anew for each layer's hook
    with ExitStack() as hooks:
        for model in run.model.models:
            for index, layer in model.layers.items():
                hooks.callback(layer.register_forward_hook(partial(add_output, sums, int(index))).remove)
        yield found
    if run.mesh.world.size > 1:
        with run.mesh.world.timed():
            dist.all_reduce(sums, group=run.mesh.world.group)
    # Without sequence parallelism every tensor-parallel rank has the same whole output.
    copies = 1 if run.config.parallel.sequence_parallel else run.mesh.tp.size
    squares, elements, gradients = sums.tolist()
    found.activation_rms = [math.sqrt(a / max(n, 1)) for a, n in zip(squares, elements, strict=True)]
    # The engine averages over data-parallel ranks: each has so many times its part of the gradient.
    found.gradient_norm = [math.sqrt(g / copies) / run.mesh.data.size for g in gradients]


@contextmanager
def recorded_layers(run: Run, step: int) -> Iterator[None]:
    """Record, where `logging.layers_every` asks for it, the norms of the step inside as the event `layers`."""
    every = run.config.logging.layers_every
    if not every or step % every:
        yield
        return
    with layer_norms(run) as found:
        yield
    run.metrics.write("layers", step=step, activation_rms=found.activation_rms, gradient_norm=found.gradient_norm)


def _add_output(sums: Tensor, index: int, _layer: nn.Module, _given: Any, output: Tensor) -> None:
    sums[0, index] += _square(output.detach())
    sums[1, index] += output.numel()
    if output.requires_grad:
        output.register_hook(partial(_add_gradient, sums, index))


def _add_gradient(sums: Tensor, index: int, gradient: Tensor) -> None:
    sums[2, index] += _square(gradient)


def _square(tensor: Tensor) -> Tensor:
    """Sum of squares, in fp32 and without a copy of the tensor; what overflows there is none the better for it."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).double().square()
