"""Whether the state of a run is one that training can go on from: not a number in it has overflowed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.parallel.mesh import ParallelMesh

if TYPE_CHECKING:
    from megallama.train.engine import Fragment


def state_is_finite(fragments: Iterable[Fragment], mesh: ParallelMesh, *, squares: bool = False) -> bool:
    """Whether weights, moments and averages are finite on every rank, or the `squares` of the weights too.

    Weights of 1e20 make activations that overflow in the next norm layer: no gradient is finite any more. One pass over
    the state without copies, and one small all-reduce: every rank must call it.
    """
    sums = defaultdict[torch.device, list[Tensor]](list)  # what is offloaded is on the host
    for fragment in fragments:
        average = () if fragment.average is None else (fragment.average,)
        for tensor in (fragment.master, *fragment.moments.values(), *average):
            sums[tensor.device].append(tensor.sum(dtype=torch.float32))
        if squares:
            sums[fragment.master.device].append(torch.linalg.vector_norm(fragment.master))
    finite = torch.ones((), dtype=torch.int32, device=mesh.device)
    for of_device in sums.values():
        finite *= torch.isfinite(torch.stack(of_device)).all()
    if mesh.world.size > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=mesh.world.group)
    return bool(finite)
