"""The plan of a run beside the run: what is predicted when it starts, and its tenth step against that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu, gpu_of_driver, load_hardware
from megallama.parallel.mesh import ParallelMesh
from megallama.plan.memory.ledger import memory_rows
from megallama.plan.memory.state import MemoryRow
from megallama.plan.report.time import check_type
from megallama.plan.time.software import machine
from megallama.plan.time.step_time import step_time
from megallama.run_dir.metrics import Metrics
from megallama.train.step_timer import StepTimer

FORECAST_STEP = 10
"""Late enough for compilation and the allocator to have settled."""


def check_plan(config: RunConfig, mesh: ParallelMesh, metrics: Metrics, step: int, timer: StepTimer) -> None:
    """Write the event `forecast` after the tenth step of a start; every rank must call it after every step."""
    if timer.steps != FORECAST_STEP:
        return
    peaks = fullest_peaks(mesh)
    if mesh.rank == 0:
        found = compared_seconds(config, mesh.world.size, device_name(mesh.device), timer.typical())
        if peaks is not None:
            found |= compared_memory(config, mesh.topology.dp, *peaks)
        if found:
            metrics.write("forecast", step=step, **found)


def predictions(config: RunConfig, mesh: ParallelMesh) -> dict[str, float]:
    """What the plan says of memory and, where the device is known and calibrated, of the seconds of a step.

    Memory is what the allocator hands out on the fullest rank, to set beside `peak_memory_bytes`.
    """
    train = config.train.model_copy(update={"device": mesh.device.type})  # `auto` is a GPU for the ledger
    ranks = memory_rows(config.model_copy(update={"train": train}), mesh.topology.dp)
    found: dict[str, float] = {"predicted_memory_bytes": allocated_bytes(ranks)}
    predicted = predicted_seconds(config, mesh.world.size, device_name(mesh.device))
    return found if predicted is None else found | {"predicted_seconds": predicted[1]}


def compared_seconds(config: RunConfig, world_size: int, device: str, seconds: float) -> dict[str, float | str]:
    """Seconds per step measured and predicted; empty where the device is not known or not calibrated."""
    found = predicted_seconds(config, world_size, device)
    if found is None:
        return {}
    gpu, predicted = found
    software = next(iter(gpu.efficiency))
    return {"gpu": gpu.key, "software": software, "seconds": seconds, "predicted_seconds": predicted}


def predicted_seconds(config: RunConfig, world_size: int, device: str) -> tuple[Gpu, float] | None:
    """The device and seconds per step; None where the device is not known or not calibrated."""
    try:
        gpu = gpu_of_driver(device, load_hardware())
        if gpu is None:
            return None
        check_type(config, gpu)
        return gpu, step_time(config, world_size, machine(gpu)).total
    except UserError:  # a figure or a constant is missing
        return None


def compared_memory(config: RunConfig, dp_size: int, allocated: int, reserved: int) -> dict[str, float | str]:
    """Peak bytes of the fullest rank, measured and predicted.

    What is allocated is beside the plan without its overhead; what the allocator has reserved, beside all of it.
    """
    ranks = memory_rows(config, dp_size)
    return {
        "peak_memory_bytes": allocated,
        "predicted_memory_bytes": allocated_bytes(ranks),
        "peak_reserved_bytes": reserved,
        "predicted_device_bytes": max(sum(row.size for row in rows) for rows in ranks),
    }


def allocated_bytes(ranks: Sequence[Sequence[MemoryRow]]) -> int:
    """What the allocator hands out on the fullest of `ranks`."""
    return max(sum(row.size for row in rows if row.key != "overhead") for rows in ranks)


def fullest_peaks(mesh: ParallelMesh) -> tuple[int, int] | None:
    """Most bytes allocated, and reserved, on any rank; None on a CPU, whose allocator keeps no count."""
    if mesh.device.type != "cuda":
        return None
    peaks = [torch.cuda.max_memory_allocated(mesh.device), torch.cuda.max_memory_reserved(mesh.device)]
    found = torch.tensor(peaks, device=mesh.device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.world.group)
    allocated, reserved = found.tolist()
    return allocated, reserved


def device_name(device: torch.device) -> str:
    """As `environment.json` has it: a GPU by its driver's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
