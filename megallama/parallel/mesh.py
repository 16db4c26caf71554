"""The mesh of a running job: process groups and device, held by one object and passed as an argument."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megallama.config.schema import AXIS_KEYS
from megallama.errors import UserError
from megallama.layout.topology import AXES, AxisName, Topology
from megallama.parallel.clock import Clock
from megallama.parallel.join import COLLECTIVE_TIMEOUT, join
from megallama.parallel.launch import Launch
from megallama.parallel.plain import of_all


@dataclass(frozen=True)
class Axis:
    """One axis as this rank sees it: the ranks it talks to there, its place among them, their number."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    timed: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered while this rank talks along the axis."""


ALONE = Axis(group=None, rank=0, size=1)


@dataclass(frozen=True)
class ParallelMesh:
    """Process groups of the topology around this rank.

    `data` is dp x cp, over which ZeRO cuts and gradients are summed; `model` is tp x pp, which together hold one copy
    of the parameters.
    """

    topology: Topology
    rank: int
    device: torch.device
    axes: Mapping[AxisName, Axis]
    """Along which the model talks; that of dp is part of `data` alone."""
    data: Axis
    model: Axis
    world: Axis
    nodes: tuple[str, ...]
    """The host of each rank."""
    clock: Clock

    @property
    def tp(self) -> Axis:
        """The ranks that share each matrix."""
        return self.axes["tp"]

    @property
    def pp(self) -> Axis:
        """The ranks that share the layers."""
        return self.axes["pp"]


def pick_device(wanted: str, local_rank: int, *, own: bool = False) -> torch.device:
    """The device of this rank; `own`: where it sees a single one, that is its own. UserError where it has none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but this machine has no CUDA device; use train.device=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if own and count == 1:
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise UserError(f"local rank {local_rank} has no CUDA device: this node has {count}; start {count} a node")
    return torch.device("cuda", local_rank)


def driver_versions(device: torch.device) -> dict[str, str]:
    """What a GPU runs on, by the name that a sentence calls it by; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    runtime: Any = torch._C
    return {
        "the version of CUDA": str(torch.version.cuda),
        "the version of NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        "the CUDA version of the driver": str(runtime._cuda_getDriverVersion()),
    }


def build_mesh(topology: Topology, launch: Launch, device: torch.device) -> ParallelMesh:
    """Build this rank's groups, after joining the job where that is not done; all ranks must call this.

    A rank makes the groups that it is in and that are used, each of its ranks once: five at most, whatever the world.
    """
    join(launch, device)
    clock = Clock(device)
    made: dict[tuple[int, ...], Any] = {tuple(range(launch.world_size)): dist.group.WORLD}

    def axis(talk: str, *names: AxisName, of_one: bool = False) -> Axis:
        ranks = tuple(topology.peers(launch.rank, names))
        if ranks not in made and (len(ranks) > 1 or of_one):
            # Made by its members: those of other groups neither call nor wait.
            made[ranks] = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT, use_local_synchronization=True)
        return Axis(made.get(ranks), ranks.index(launch.rank), len(ranks), partial(clock.span, talk))

    return ParallelMesh(
        topology=topology,
        rank=launch.rank,
        device=device,
        axes={name: axis(AXIS_KEYS[name], name) for name in AXES if name != "dp"},
        data=axis("data_parallel", "dp", "cp", of_one=True),  # DeepSpeed takes none for all ranks
        model=axis("data_parallel", "pp", "tp", of_one=True),
        world=Axis(dist.group.WORLD, launch.rank, launch.world_size, partial(clock.span, "data_parallel")),
        nodes=tuple(of_all(socket.gethostname(), dist.group.WORLD, device)),
        clock=clock,
    )


def sum_losses(values: Sequence[float], mesh: ParallelMesh) -> list[float]:
    """The sum of each value over the data-parallel copies, where only the last stage of each has it and others 0."""
    return sum_over(sum_over(values, mesh.pp, mesh.device), mesh.data, mesh.device)


def sum_over(values: Sequence[float], axis: Axis, device: torch.device) -> list[float]:
    """The sum of each value over the ranks of `axis`; every one of them must call this."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if axis.size > 1:
        dist.all_reduce(total, group=axis.group)
    return [float(value) for value in total.tolist()]
