"""What this machine can do, measured: the peak that MFU is a share of, and the figures of a CPU."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psutil
import torch
import torch.distributed as dist
from torch.nn import functional as F

from megallama.hardware.gpus import LINK_FRACTION, built_in_hardware, gpu_of_driver
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks


@dataclass(frozen=True)
class Peak:
    """FLOP/s that count as 100 % of MFU, and where the number is from."""

    flops: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The published bf16 peak of a known accelerator; elsewhere the best of some timed matmuls in `dtype`."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = gpu_of_driver(name, built_in_hardware())
        if known is not None:
            return Peak(known.known("peak_tflops") * 1e12, f"published, {name}")
    return Peak(measured_matmul(device, dtype), f"measured {dtype} matmul on {device.type}")


def measured_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matmul of random numbers, the best of three at least and of a fifth of a second.

    By a transposed matrix, as in linear layers: a CPU without bf16 units takes seven times as long by another.
    """
    n = 8192 if device.type == "cuda" else 512  # a CPU without bf16 units takes a third of a second for 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    found: list[float] = []
    while len(found) < 3 or sum(found) < 0.2:  # other work on the machine comes and goes
        _synchronise(device)
        start = time.perf_counter()
        a @ b.t()
        _synchronise(device)
        found.append(time.perf_counter() - start)
    return 2 * n**3 / min(found)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on the device, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_LONG = 0.25
"""Seconds after which a matmul is large enough: a CPU without bf16 units takes a third of one for 1024 in bf16."""


def measure_cpu(dtype: str, threads: int, swiglu_elements: int) -> dict[str, float | int | str]:
    """The entry `cpu` of a hardware file for ranks of so many threads each, in fp32 or bf16.

    A rank stands for a GPU and the machine for a node. Kernels of SwiGLU count as so many elements read and written for
    each of theirs. Takes some seconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        element = torch.bfloat16 if dtype == "bf16" else torch.float32
        flops, bandwidth = matmul_flops(element), kernel_bandwidth(element, swiglu_elements)
    finally:
        torch.set_num_threads(before)
    ranks = max(1, len(os.sched_getaffinity(0)) // threads)
    figures: dict[str, float | int | str] = {
        "kind": "cpu",
        "peak_tflops": _rounded(flops / 1e12),
        "memory_tb_s": _rounded(bandwidth / 1e12),
        "memory_gib": _rounded(psutil.virtual_memory().total / ranks / 2**30),
        "gpus_per_node": ranks,
    }
    if ranks > 1:
        figures["node_link_gb_s"] = _rounded(min(run_ranks(link_bandwidth, 2)) / LINK_FRACTION / 1e9)
    return figures


def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of the best square matmul, by a transposed matrix as in linear layers."""
    best = 0.0
    for n in (256, 512, 1024, 2048):
        a, b = (torch.randn(n, n, dtype=dtype) for _ in range(2))
        seconds = _shortest(partial(torch.matmul, a, b.t()))
        best = max(best, 2 * n**3 / seconds)
        if seconds > _LONG:
            break
    return best


def kernel_bandwidth(dtype: torch.dtype, swiglu_elements: int) -> float:
    """Bytes per second of SwiGLU, forward and backward, counted as so many elements for each of theirs.

    It stands for all that is not a matmul. On a CPU such kernels wait for arithmetic as well as for memory, and run at
    about half of the rate at which memory is copied.
    """
    gate, up = (torch.randn(1 << 20, dtype=dtype, requires_grad=True) for _ in range(2))
    gradient = torch.ones_like(gate)

    def both() -> None:
        gate.grad = up.grad = None
        (F.silu(gate) * up).backward(gradient)

    return swiglu_elements * gate.numel() * gate.element_size() / _shortest(both)


def link_bandwidth(launch: Launch) -> float:
    """Bytes per second that an all-reduce over the two ranks sends from this one."""
    mesh = build_mesh(Topology(dp=2), launch, torch.device("cpu"))
    values = torch.ones(1 << 22)
    # As often on both ranks, however long it takes on each.
    seconds = _shortest(lambda: dist.all_reduce(values, group=mesh.data.group), least_seconds=0)
    return values.numel() * values.element_size() / seconds


def _shortest(work: Callable[[], object], least_seconds: float = 0.5) -> float:
    """Seconds of the fastest, after one that is not timed: of five at least, and of so many seconds together."""
    work()
    found: list[float] = []
    while len(found) < 5 or sum(found) < least_seconds:
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
