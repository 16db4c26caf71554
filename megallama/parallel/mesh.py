"""The mesh of a running job: process groups and device, held by one object and passed as an argument.

The only module that reads the launcher's environment.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from megallama.errors import UserError
from megallama.launcher import Ancestors
from megallama.parallel.topology import AxisName, Topology
from megallama.signals import Signals

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_FAR_AWAY = "192.0.2.1"
"""Nobody's, by RFC 5737: the way there is the default route."""


@dataclass(frozen=True)
class Axis:
    """One axis as this rank sees it: the ranks it talks to there, its place among them, their number."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


ALONE = Axis(group=None, rank=0, size=1)


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process; one process alone when it says nothing."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    elastic: bool = False
    """Under torchrun, which takes every exit code but 0 for a failure of the rank."""
    launcher: Ancestors = field(default_factory=Ancestors, compare=False)
    """The launcher itself: as early as it was looked for, so early is its end noticed."""
    signals: Signals = field(default_factory=Signals, compare=False)
    """What signals ask of this process, if they were taken over."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Launch:
        """As torchrun and deepspeed set it; deepspeed says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE."""
        world_size = int(environ.get("WORLD_SIZE", 1))
        local_size = int(environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", world_size)))
        elastic = "TORCHELASTIC_RUN_ID" in environ
        return cls(int(environ.get("RANK", 0)), int(environ.get("LOCAL_RANK", 0)), world_size, local_size, elastic)

    def prepare(self, device: torch.device) -> None:
        """Set up this process for `device`; call it before deepspeed is imported, which looks for a device then."""
        os.environ["DS_ACCELERATOR"] = device.type
        os.environ["LOCAL_RANK"] = str(self.local_rank)  # deepspeed refuses to start without one, also when alone
        if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_world_size))


@dataclass(frozen=True)
class ParallelMesh:
    """Process groups of the topology around this rank.

    `data` is dp x cp, over which ZeRO cuts and gradients are summed; `model` is tp x pp, which together hold one copy
    of the parameters.
    """

    topology: Topology
    rank: int
    device: torch.device
    tp: Axis
    pp: Axis
    data: Axis
    model: Axis
    world: Axis


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank. UserError when CUDA is asked for and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but this machine has no CUDA device; use train.device=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"local rank {local_rank} has no CUDA device: this node has {count}; start {count} a node")
    return torch.device("cuda", local_rank)


def build_mesh(topology: Topology, launch: Launch, device: torch.device) -> ParallelMesh:
    """Join the job (gloo on CPU, nccl on CUDA) and build every group; all ranks must call this."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join(launch, device)

    def axis(*names: AxisName) -> Axis:
        mine = None
        # Every rank takes part in making every group, also those it is not in.
        for ranks in topology.groups(names):
            group = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)
            if launch.rank in ranks:
                mine = Axis(group, ranks.index(launch.rank), len(ranks))
        assert mine is not None
        return mine

    return ParallelMesh(
        topology=topology,
        rank=launch.rank,
        device=device,
        tp=axis("tp"),
        pp=axis("pp"),
        data=axis("dp", "cp"),
        model=axis("pp", "tp"),
        world=Axis(dist.group.WORLD, launch.rank, launch.world_size),
    )


def talk_over(address: str) -> None:
    """Let gloo talk over the interface that leads to `address`, unless GLOO_SOCKET_IFNAME says which.

    It would take that of this machine's own name, which many systems give to loopback: no other node is there.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own = _address_towards(address)
    if own.startswith("127.") and not address.startswith("127."):  # the name is this machine's own
        own = _address_towards(_FAR_AWAY) or own
    for name, addresses in psutil.net_if_addrs().items():
        if own in (found.address for found in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _address_towards(address: str) -> str:
    """This machine's own on the way there; empty where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 1))  # sends nothing, and chooses a route
        except OSError:
            return ""  # joining will say it better
        own: str = probe.getsockname()[0]
        return own


def _join(launch: Launch, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launch.world_size == 1:
        # A store in memory: one process needs no port and no address.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
        return
    if launch.world_size > launch.local_world_size:
        talk_over(os.environ["MASTER_ADDR"])
    dist.init_process_group(
        backend,
        init_method="env://",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
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
