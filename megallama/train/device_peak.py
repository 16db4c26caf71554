"""What this device could do at most: the denominator of MFU, and the memory that was needed."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from megallama.plan.hardware import published_peak


@dataclass(frozen=True)
class Peak:
    """FLOP/s that count as 100 % of MFU, and where the number is from."""

    flops: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The published bf16 peak of a known accelerator; elsewhere the best of three timed matmuls in `dtype`."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        published = published_peak(name)
        if published is not None:
            return Peak(published, f"published, {name}")
    return Peak(measured_matmul(device, dtype), f"measured {dtype} matmul on {device.type}")


def measured_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matmul of random numbers, the best of three."""
    n = 8192 if device.type == "cuda" else 512  # a CPU without bf16 units takes half a second for 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        _synchronise(device)
        start = time.perf_counter()
        a @ b
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on the device, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
