"""What the launcher says of this process: its rank, and where the ranks of its job meet.

The only module that reads a launcher's environment: that of torchrun and deepspeed, of Slurm's srun, of Open MPI's
mpirun, and of the PMI that other MPIs have. Imports no torch: a mistake there is told at once.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from socket import socket
from typing import TYPE_CHECKING

from megallama.errors import UserError
from megallama.system.ancestors import Ancestors
from megallama.system.signals import Signals

if TYPE_CHECKING:
    import torch

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
FIRST_PORT, PORTS = 10000, 20000
"""Ports that are made of a job's number: above those of services, below those that Linux gives to connections."""
_LARGEST_STEP = 0xFFFFFFF0
"""Slurm counts the steps of a job from 0; numbers from here on are the batch script and an interactive shell."""

Said = Mapping[str, str]


@dataclass(frozen=True)
class _Names:
    """Where a launcher says what; of several names the first that is set counts."""

    rank: str
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...]


_TORCH = _Names("RANK", ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_OPEN_MPI = _Names(
    "OMPI_COMM_WORLD_RANK",
    ("OMPI_COMM_WORLD_SIZE",),
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_PMI = _Names("PMI_RANK", ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"))
_SRUN = _Names("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",), ())


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
    address: str = LOOPBACK
    """The address of rank 0's node, where ranks meet."""
    port: int = DEFAULT_PORT
    attempt: str = "0"
    """Which start of the ranks by one launcher this is: torchrun starts them again where it is told to."""
    hosted: bool = False
    """The launcher itself hosts the store at which ranks meet, and rank 0 does not."""
    variables: str = "RANK and WORLD_SIZE"
    """The variables that said so."""
    by_tasks: bool = False
    """Under srun or mpirun, which may show each rank its own device only, and srun lets ranks outlive each other."""
    cpus_per_task: int = 0
    """Under srun, where it was told; 0 elsewhere."""
    door: socket | None = field(default=None, compare=False)
    """Rank 0's listening socket, where it has been opened before the ranks meet."""
    signals: Signals = field(default_factory=Signals, compare=False)
    """What signals ask of this process, if they were taken over."""
    began: float = field(default_factory=time.monotonic, compare=False)
    """When this was made, by time.monotonic()."""

    @classmethod
    def from_environment(cls, environ: Said = os.environ) -> Launch:
        """As the launcher set it; one process alone where none did.

        UserError where only a part is set, or what cannot be. A variable that is set to nothing counts as unset.
        """
        said = {name: value for name, value in environ.items() if value}
        if said.get("RANK") or said.get("WORLD_SIZE", "1") != "1":
            return _by_torch(said)
        for names in (_OPEN_MPI, _PMI):
            if names.rank in said:
                return _by_scheduler(said, names)
        if "SLURM_PROCID" in said and _number(said, "SLURM_STEP_ID", _LARGEST_STEP) < _LARGEST_STEP:
            return _by_scheduler(said, _SRUN)
        return cls(local_rank=_number(said, "LOCAL_RANK", 0))

    @property
    def processors(self) -> int:
        """This rank's share of the processors of its node."""
        here = len(os.sched_getaffinity(0))
        # Slurm may have bound the task to its own: then there is nothing left to share.
        return min(here, self.cpus_per_task) if self.cpus_per_task else max(1, here // self.local_world_size)

    def prepare(self, device: torch.device) -> None:
        """Set up this process for `device`; call it before deepspeed is imported, which looks for a device then."""
        import torch

        os.environ["DS_ACCELERATOR"] = device.type
        # deepspeed refuses to start without one, also when alone, and takes it for the number of the device.
        os.environ["LOCAL_RANK"] = str(self.local_rank if device.index is None else device.index)
        if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # deepspeed wants them equal
            os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = os.environ["LOCAL_RANK"]
        if device.type == "cuda":
            if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
                # Blocks that grow waste less of the memory than blocks of many sizes.
                os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
        if device.type == "cpu":
            # Else deepspeed counts the nodes of memory by a program, in every reduction of ZeRO 3.
            os.environ["LOCAL_SIZE"] = str(self.local_world_size)
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(self.processors)


def _by_torch(said: Said) -> Launch:
    """As torchrun and deepspeed say it, or whoever sets the same variables by hand."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if other not in said:
            raise UserError(
                f"{name}={said[name]} is set and {other} is not; start by torchrun, deepspeed, srun or mpirun, which "
                f"set all that is needed, or unset {name} for one process"
            )
    launch = _ranks(said, _TORCH, 0)
    if launch.world_size == 1:
        return launch
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in said]
    if missing:
        raise UserError(
            f"RANK={launch.rank} and WORLD_SIZE={launch.world_size} are set and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not; set MASTER_ADDR and MASTER_PORT to the node of rank 0 and a "
            "free port there, start by torchrun or deepspeed, or unset RANK and WORLD_SIZE for one process"
        )
    return _meeting_at(launch, said, said["MASTER_ADDR"], DEFAULT_PORT)


def _by_scheduler(said: Said, names: _Names) -> Launch:
    """As srun or an mpirun says it, which know of ranks, and not of where they meet."""
    launch = _ranks(said, names, _local_size_of_step(said) if names is _SRUN else 0)
    if launch.world_size == 1:
        return launch
    nodes = said.get("SLURM_STEP_NODELIST" if names is _SRUN else "SLURM_JOB_NODELIST", said.get("SLURM_JOB_NODELIST"))
    address = said.get("MASTER_ADDR")
    if address is None and launch.local_world_size == launch.world_size:
        address = LOOPBACK
    if address is None and nodes is not None:
        address = first_host(nodes)
    if address is None:
        raise UserError(
            f"{names.rank}={launch.rank} of {launch.world_size} ranks on several nodes, and none knows where rank 0 "
            "is; set MASTER_ADDR to its node, as in mpirun -x MASTER_ADDR=10.0.0.1"
        )
    return _meeting_at(launch, said, address, _port_of_job(said, names))


def _ranks(said: Said, names: _Names, local_world_size: int) -> Launch:
    """Ranks and sizes; `local_world_size` where no variable says it, and as many as there are where it is 0."""

    def first(candidates: tuple[str, ...], default: int) -> tuple[str, int]:
        name = next((name for name in candidates if name in said), candidates[0] if candidates else "")
        return name, _number(said, name, default)

    rank = _number(said, names.rank, 0)
    size_name, size = first(names.world_size, 0)
    if size == 0:
        raise UserError(f"{names.rank}={rank} is set and no {size_name} of 1 or more; start the ranks by one launcher")
    if rank >= size:
        raise UserError(
            f"{names.rank}={rank} is not below {size_name}={size}; ranks are 0 to {size - 1}: start them by one "
            f"launcher, or unset {names.rank} and {size_name} for one process"
        )
    _, local_size = first(names.local_world_size, local_world_size or size)
    _, local_rank = first(names.local_rank, 0)
    if not local_rank < local_size <= size:
        raise UserError(
            f"local rank {local_rank} of {local_size} ranks on this node does not go with {size_name}={size}; start "
            "the ranks by one launcher, which sets all of them"
        )
    return Launch(
        rank,
        local_rank,
        size,
        local_size,
        elastic="TORCHELASTIC_RUN_ID" in said,
        attempt=said.get("TORCHELASTIC_RESTART_COUNT", "0"),
        hosted=names is _TORCH and said.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        variables=f"{names.rank} and {size_name}",
        by_tasks=names is not _TORCH,
        cpus_per_task=_number(said, "SLURM_CPUS_PER_TASK", 0) if names is _SRUN else 0,
    )


def _meeting_at(launch: Launch, said: Said, address: str, default_port: int) -> Launch:
    port = _number(said, "MASTER_PORT", default_port)
    if not 1 <= port <= 65535:
        raise UserError(f"MASTER_PORT={port} is not a port; use a free one from 1024 to 65535, as {DEFAULT_PORT}")
    return replace(launch, address=address, port=port)


def _number(said: Said, name: str, default: int) -> int:
    value = said.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 12):
        raise UserError(f"{name}={value[:40]!r} is not a number; a launcher sets it to one of 0 or more, or unset it")
    return int(value)


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: rack1n03 of `rack[1-2]n[03-04,9],other`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else "")


def _local_size_of_step(said: Said) -> int:
    """Tasks of the step on this node, which Slurm tells as `4(x3),1`, node by node."""
    counts: list[int] = []
    told = said.get("SLURM_STEP_TASKS_PER_NODE", said.get("SLURM_TASKS_PER_NODE", ""))
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", told):
        counts += [int(count)] * int(times or 1)
    node = _number(said, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 0


def _port_of_job(said: Said, names: _Names) -> int:
    """The same on every rank of a job, and another for its next step, its next start and other jobs."""
    if names is _SRUN:
        job, step, again = (_number(said, f"SLURM_{what}", 0) for what in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
        return FIRST_PORT + (job + 7919 * again + 104729 * step) % PORTS
    job_of_mpi = said.get("PMIX_NAMESPACE")
    return DEFAULT_PORT if job_of_mpi is None else FIRST_PORT + zlib.crc32(job_of_mpi.encode()) % PORTS
