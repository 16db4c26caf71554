"""AdamW (arXiv 1711.05101) over what a rank trains: its groups, and an update that is decided on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from megallama.config.schema import OptimizerConfig

ParameterGroups: TypeAlias = list[tuple[bool, list[nn.Parameter]]]
"""With whether they are decayed."""
_ROW = 4096
"""Elements of which the squares are added up in fp32."""


def parameter_groups(trained: Iterable[nn.Parameter], most: int | None = None) -> ParameterGroups:
    """Matrices, which are decayed, at most so many elements in a group, and norm weights, which are not, in the last.

    ZeRO 3 says of what it has cut how it was.
    """
    matrices: list[list[nn.Parameter]] = []
    norms: list[nn.Parameter] = []
    size = 0
    for parameter in trained:
        if len(getattr(parameter, "ds_shape", parameter.shape)) < 2:
            norms.append(parameter)
            continue
        if not matrices or (most is not None and size + parameter.numel() > most):
            matrices.append([])
            size = 0
        matrices[-1].append(parameter)
        size += parameter.numel()
    return [*((True, group) for group in matrices), *([(False, norms)] if norms else [])]


def adamw(groups: ParameterGroups, settings: OptimizerConfig) -> torch.optim.AdamW:
    """torch's, fused."""
    decays = {True: settings.weight_decay, False: 0.0}
    given = [{"params": group, "weight_decay": decays[decayed]} for decayed, group in groups]
    lr, betas, eps = settings.lr, settings.betas, settings.eps
    return torch.optim.AdamW(given, lr=lr, betas=betas, eps=eps, fused=True)


def square(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all squares of these fp32 tensors, fp64 and on their device; one pass over them, without a copy."""
    sums = [torch.linalg.vector_norm(rows, dim=-1).double().square().sum() for rows in _rows(tensors)]
    return torch.stack(sums).sum()


def _rows(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """[n, _ROW], and what is left of each. On a CPU a norm of 2e7 elements in one go is off by a thousandth."""
    for tensor in tensors:
        flat, whole = tensor.reshape(-1), tensor.numel() - tensor.numel() % _ROW
        if whole:
            yield flat[:whole].view(-1, _ROW)
        if whole < flat.numel():
            yield flat[whole:]


@contextmanager
def decided(optimizer: torch.optim.AdamW, divisor: Tensor, skip: Tensor) -> Iterator[None]:
    """Inside, AdamW divides gradients by `divisor`, and does nothing at all where `skip` is true.

    Both are what a gradient scaler tells torch's fused AdamW on the device: the host does not wait to know them, and
    gradients are not read and written once more to be clipped.
    """
    told: Any = optimizer
    told.grad_scale, told.found_inf = divisor.float(), skip.float()
    try:
        yield
    finally:
        told.grad_scale = told.found_inf = None
