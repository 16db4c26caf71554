"""Whether ranks that hold the same numbers still hold the same bits: a flipped bit trains on without a sign."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.checkpoint.state import TrainState
from megallama.parallel.mesh import Axis
from megallama.parallel.plain import of_all
from megallama.train.run import Run

_AT_ONCE = 1 << 22
"""Elements that are hashed at once, in 32 bytes each."""


def differing_copies(run: Run, state: TrainState) -> str:
    """The sentence about weights, or a position in the data, that are not the same bits on all that have them.

    Empty where all are. Weights are compared over dp and cp, and those that tensor parallelism does not cut over tp;
    a weight that ZeRO 3 has cut has no copy. Every rank must call it: a pass over the weights, and two small
    all-reduces for each group.
    """
    hashes, whole = dict[str, Tensor](), dict[str, Tensor]()
    for local, weight in run.model.named_parameters():
        pieces = run.model.shard_slices[local]
        if pieces and weight.numel():
            names, found = [piece.name.split(".") for piece in pieces], bits_hash(weight)
            name = ".".join(names[0]) + "".join(f" + {other[-2]}" for other in names[1:])
            hashes[name] = found
            # Of a small vocabulary one rank may have all rows, and others none.
            if names[0][-2] not in ("embed_tokens", "lm_head") and all(piece.size == piece.shape for piece in pieces):
                whole[name] = found
    position = torch.tensor(hash((state.step, state.samples, state.passed_over)), device=run.mesh.device)
    mine = [
        *unequal({"the position in the data": position}, run.mesh.world),
        *unequal(hashes, run.mesh.data),
        *unequal(whole, run.mesh.tp),
    ]
    every = [found for of_rank in of_all(mine, run.mesh.world.group, run.mesh.device) for found in of_rank]
    return "; ".join(sorted(set(every))[:3])


def unequal(hashes: dict[str, Tensor], axis: Axis) -> list[str]:
    """Whose hash differs between the ranks of `axis`, and on which ranks of the world; all of them must call it."""
    if axis.size == 1 or not hashes:
        return []
    values = torch.stack(list(hashes.values()))
    least, most = values.clone(), values.clone()
    with axis.timed():
        dist.all_reduce(least, dist.ReduceOp.MIN, group=axis.group)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=axis.group)
    names = [name for name, differs in zip(hashes, (least != most).tolist(), strict=True) if differs]
    return [_who(name, int(hashes[name]), axis, values.device) for name in names]


def _who(name: str, value: int, axis: Axis, device: torch.device) -> str:
    assert axis.group is not None
    ranks = [dist.get_global_rank(axis.group, rank) for rank in range(axis.size)]
    every = of_all(value, axis.group, device)
    usual, count = Counter(every).most_common(1)[0]
    others = [rank for rank, value in zip(ranks, every, strict=True) if value != usual]
    few = ", ".join(map(str, others[:8])) + (" and others" if len(others) > 8 else "")
    same = ranks[every.index(usual)]
    return f"{name} has other bits on rank {few} than on rank {same}" + (f" and {count - 1} more" if count > 1 else "")


def bits_hash(weight: Tensor) -> Tensor:
    """A number of 64 bits that changes with every bit of `weight`: its bits times odd numbers, summed, modulo 2^64."""
    bits = weight.detach().reshape(-1).view(torch.int16 if weight.element_size() == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, len(bits), _AT_ONCE):
        part = bits[start : start + _AT_ONCE].to(torch.int64)
        factors = torch.arange(start, start + len(part), device=weight.device) * 0x1E3779B97F4A7C16 | 1
        total += (part * factors).sum()
    return total
