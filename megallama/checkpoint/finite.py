"""Whether the state of a run is one that training can go on from: not a number in it has overflowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megallama.parallel.mesh import ParallelMesh

if TYPE_CHECKING:
    from megallama.engine import Fragment


def state_is_finite(fragments: Iterable[Fragment], mesh: ParallelMesh) -> bool:
    """Whether weights, their squares and both moments are finite on every rank; every rank must call it.

    Weights of 1e20 make activations that overflow in the next norm layer, so they are as lost as those that are not
    finite. One pass over the state without copies, and one small all-reduce.
    """
    sums = [torch.zeros((), device=mesh.device)]
    for fragment in fragments:
        sums += [torch.linalg.vector_norm(fragment.master), fragment.exp_avg.sum(), fragment.exp_avg_sq.sum()]
    finite = torch.isfinite(torch.stack(sums)).all().to(torch.int32)
    if mesh.world.size > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=mesh.world.group)
    return bool(finite)
