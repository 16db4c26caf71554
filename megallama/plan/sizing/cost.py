"""What a step time comes to: tokens per second, MFU, hours, money and energy. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megallama.config.schema import RunConfig
from megallama.hardware.gpus import Gpu
from megallama.layout.counts import flops_per_token, hardware_flops_per_token

# Power that a data centre draws for each watt of its machines: that of arXiv 2302.13971, table 15.
PUE = 1.1


@dataclass(frozen=True)
class Speed:
    """Tokens per second, and shares of the published peak that they are."""

    tokens_per_second: float
    """The rate of all GPUs together."""
    tokens_per_second_per_gpu: float
    mfu_full: float
    """Attention counted over the whole square of positions."""
    mfu_causal: float
    """Over the half that a causal kernel computes."""
    hfu: float
    """With what is computed again, full; mfu_full where nothing is."""
    mfu_attainable: float | None
    """mfu_full over the best matmul that anybody measured, None where nobody has."""


@dataclass(frozen=True)
class RunCost:
    """A whole run at a steady pace: no stop, no evaluation, no save."""

    steps: int
    hours: float
    """Wall time."""
    gpu_hours: float
    money: float | None
    """In the currency of the price; None without one."""
    energy_mwh: float | None
    """GPUs at their power limit, with the data centre's part; None where the limit is not known."""


def speed(config: RunConfig, world_size: int, gpu: Gpu, seconds: float) -> Speed:
    """The speed of steps that take `seconds`; UserError if the peak of `gpu` is not known."""
    model, length = config.model, config.data.sequence_length
    rate = config.tokens_per_step / world_size / seconds
    peak = gpu.known("peak_tflops") * 1e12
    full = flops_per_token(model, length, "full")
    return Speed(
        tokens_per_second=config.tokens_per_step / seconds,
        tokens_per_second_per_gpu=rate,
        mfu_full=rate * full / peak,
        mfu_causal=rate * flops_per_token(model, length, "causal") / peak,
        hfu=rate * hardware_flops_per_token(model, length, config.train.recompute) / peak,
        mfu_attainable=None if gpu.matmul_tflops is None else rate * full / (gpu.matmul_tflops * 1e12),
    )


def run_cost(
    tokens_per_step: int,
    world_size: int,
    gpu: Gpu,
    seconds: float,
    tokens: float,
    price: float | None = None,
) -> RunCost:
    """The cost of `tokens` in steps of `seconds`; `price` is for one GPU-hour."""
    steps = ceil(tokens / tokens_per_step)
    hours = steps * seconds / 3600
    gpu_hours = hours * world_size
    return RunCost(
        steps=steps,
        hours=hours,
        gpu_hours=gpu_hours,
        money=None if price is None else gpu_hours * price,
        energy_mwh=None if gpu.power_w is None else gpu_hours * gpu.power_w * PUE / 1e6,
    )
