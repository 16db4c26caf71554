"""The tenth step of a start against its plan: step time and memory as they are, beside what was predicted."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import gpu_of_driver, load_hardware
from megallama.parallel.mesh import ParallelMesh
from megallama.plan.memory.ledger import memory_rows
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


def compared_seconds(config: RunConfig, world_size: int, device: str, seconds: float) -> dict[str, float | str]:
    """Seconds per step measured and predicted; empty where the device is not known or not calibrated."""
    try:
        gpu = gpu_of_driver(device, load_hardware())
        if gpu is None:
            return {}
        check_type(config, gpu)
        predicted = step_time(config, world_size, machine(gpu)).total
    except UserError:  # a figure or a constant is missing: what cannot be predicted is not compared
        return {}
    software = next(iter(gpu.efficiency))
    return {"gpu": gpu.key, "software": software, "seconds": seconds, "predicted_seconds": predicted}


def compared_memory(config: RunConfig, dp_size: int, allocated: int, reserved: int) -> dict[str, float | str]:
    """Peak bytes of the fullest rank, measured and predicted.

    What is allocated is beside the plan without its overhead; what the allocator has reserved, beside all of it.
    """
    ranks = memory_rows(config, dp_size)
    return {
        "peak_memory_bytes": allocated,
        "predicted_memory_bytes": max(sum(row.size for row in rows if row.key != "overhead") for rows in ranks),
        "peak_reserved_bytes": reserved,
        "predicted_device_bytes": max(sum(row.size for row in rows) for rows in ranks),
    }


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
