"""Gradients of norms, of which each tensor-parallel rank has the share of what it normalises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megallama.parallel.collectives import all_reduce
from megallama.parallel.mesh import Axis


def has_share(parameter: nn.Parameter) -> bool:
    """Whether the gradient that backward leaves of it is this tensor-parallel rank's share of a sum."""
    return hasattr(parameter, "has_share_of_gradient")


@torch.no_grad()
def sum_shares(gradients: Sequence[Tensor], tp: Axis) -> None:
    """Make each of them its sum over `tp`, in one all-reduce for all, as Megatron-LM does; every rank must call it.

    Once per step, of the part that ZeRO leaves to this rank: in backward they would be two small all-reduces for each
    layer and micro-batch, which cost latency alone.
    """
    if tp.size == 1 or not gradients:
        return
    summed = all_reduce(torch.cat([each.flatten() for each in gradients]), tp)
    for gradient, whole in zip(gradients, summed.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(whole.view_as(gradient))
