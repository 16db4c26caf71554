"""Step time of a run, and what it comes to: tokens per second, MFU, hours, money and energy. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu
from megallama.layout.budget import batches_of, steps_words, with_batch
from megallama.layout.check import check_batching
from megallama.layout.counts import flops_per_token, hardware_flops_per_token, kernel_convention
from megallama.layout.frozen import frozen_matmul
from megallama.plan.memory.activations import tensors
from megallama.plan.memory.traffic import Traffic
from megallama.plan.report.table import Part, Row
from megallama.plan.time.communication import NODE_LATENCY, Group, data_traffic, latency, ring_bandwidth
from megallama.plan.time.software import Machine
from megallama.plan.time.step_time import (
    HOST_MEMORY_GB_S,
    StepTime,
    context_group,
    data_group,
    optimizer_bytes,
    rank_works,
    slowest_work,
    step_time,
)

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
    """Over what the kernel computes: half of it, for a masked model all."""
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
    convention, frozen = kernel_convention(config.train.objective), frozen_matmul(config)
    full = flops_per_token(model, length, "full", frozen)
    return Speed(
        tokens_per_second=config.tokens_per_step / seconds,
        tokens_per_second_per_gpu=rate,
        mfu_full=rate * full / peak,
        mfu_causal=rate * flops_per_token(model, length, convention, frozen) / peak,
        hfu=rate * hardware_flops_per_token(model, length, config.train.recompute, frozen) / peak,
        mfu_attainable=None if gpu.matmul_tflops is None else rate * full / (gpu.matmul_tflops * 1e12),
    )


def run_cost(
    config: RunConfig, world_size: int, on: Machine, seconds: float, tokens: float, price: float | None = None
) -> RunCost:
    """The cost of `tokens` in steps of `seconds`, those of train.batch_ramp of their own; `price` is for a GPU-hour."""
    last, gpu = config.train.global_batch_size, on.gpu
    stages = [
        (steps, seconds if batch == last else step_time(with_batch(config, batch), world_size, on).total)
        for batch, steps in batches_of(config, tokens)
    ]
    hours = sum(steps * each for steps, each in stages) / 3600
    gpu_hours = hours * world_size
    return RunCost(
        steps=sum(steps for steps, _ in stages),
        hours=hours,
        gpu_hours=gpu_hours,
        money=None if price is None else gpu_hours * price,
        energy_mwh=None if gpu.power_w is None else gpu_hours * gpu.power_w * PUE / 1e6,
    )


def time_parts(
    config: RunConfig, world_size: int, on: Machine, step: StepTime, tokens: float, price: float | None = None
) -> list[Part]:
    """Step time, speed and cost of `tokens` on `world_size` GPUs; `price` is for one GPU-hour, in any currency."""
    return [
        _step_time(config, world_size, on, step),
        _speed(config, world_size, on, step),
        _cost(config, world_size, on, step, tokens, price),
    ]


def check_type(config: RunConfig, gpu: Gpu) -> None:
    """UserError if the peak of `gpu` is of another type than the run's."""
    if config.train.dtype == "fp32" and gpu.kind == "gpu":
        raise UserError(f"train.dtype=fp32 has no step time on {gpu.key}, whose peak is of bf16; use train.dtype=bf16")


def _step_time(config: RunConfig, world_size: int, on: Machine, step: StepTime) -> Part:
    title = f"Predicted step time on {world_size} x {on.gpu.name}, {on.software.name}"
    if step.assumed:
        how = f"tokens * FLOPs per token / ({world_size} * {on.gpu.peak_tflops} TFLOP/s * the MFU assumed by --mfu)"
        return Part("step_time", title, (Row("total", "one step", how, step.total, "s"),))
    batching, parallel = check_batching(config, world_size), config.parallel
    copies = data_group(config, batching.dp_size)
    works = rank_works(config, on, batching.gradient_accumulation_steps)
    work = slowest_work(works, config, on)
    bandwidth, each = on.gpu.known("memory_tb_s"), f"{batching.gradient_accumulation_steps} micro-batches"
    matmul = f"{each} * {work.kernels.matmul_flops:.4g} FLOPs at {on.efficiency:.1%} of {on.gpu.peak_tflops} TFLOP/s"
    if work.kernels.fp8_flops:
        matmul += f", and {work.kernels.fp8_flops:.4g} in fp8 at twice that"
    share = on.software.attention_rate(on.gpu)
    attention = f"{each} * {work.kernels.attention_flops:.4g} FLOPs at {share:.2g} of that rate"
    moved = work.kernels.bytes_moved + work.sums
    rows = [
        Row("matmul", "matmuls", matmul, step.matmul, "s"),
        Row("attention", "attention", attention, step.attention, "s"),
        Row("memory", "memory", f"{each} * {moved:.4g} B of kernels over {bandwidth} TB/s", step.memory, "s"),
        Row("compute", "compute", "matmuls + attention + memory", step.compute, "s"),
    ]
    if parallel.tensor > 1:
        how = f"{each} * {_collectives(work.traffic, on.gpu, Group(parallel.tensor))}"
        how += _hidden(on, "tensor") or _hidden(on, "columns")
        if norms := work.once.size["all_reduce"]:
            how += f"; of norms' gradients {_bytes(norms)} at once"
        rows.append(Row("tensor", "tensor-parallel communication", how, step.tensor, "s"))
    if parallel.context > 1:
        how = f"{each} * {_collectives(work.context, on.gpu, context_group(config))}, {parallel.context_mode}"
        rows.append(Row("context", "context-parallel communication", how, step.context, "s"))
    if parallel.pipeline > 1:
        way = _speed_of(on.gpu, Group(2, copies.size * copies.stride))
        number = max(each.messages for each in works)
        one = f"{number} messages of {_bytes(tensors(config).state)} at {way}, {1e6 * NODE_LATENCY:g} us each"
        how = f"{each} * {one}{_hidden(on, 'pipeline')}"
        rows.append(Row("pipeline", "pipeline communication", how, step.pipeline, "s"))
        waiting = step.bubble / (step.busy + step.pipeline)
        between = "tensor, context" if parallel.context > 1 else "tensor"
        how = f"{parallel.schedule}, pp {parallel.pipeline}: {waiting:.4g} of compute, {between} and pipeline"
        rows.append(Row("bubble", "bubble", how, step.bubble, "s"))
    parameters = max(each.parameters for each in works)
    if copies.size > 1:
        traffic = data_traffic(config, on.software, parameters, batching.gradient_accumulation_steps)
        how = f"ZeRO-{config.zero.stage}: {_collectives(traffic, on.gpu, copies)}"
        own = on.software.gradients == "zero" and config.zero.stage == 1
        hidden = ", sums behind the last backward but for the last group" if own else _hidden(on, "data")
        rows.append(Row("data", "data-parallel communication", how + hidden, step.data, "s"))
    share = on.software.optimizer_ranks(copies.size)
    where = f"{optimizer_bytes(config, on.software)} B * {parameters:.4g} parameters / {share} copies over"
    host = config.zero.offload_optimizer == "cpu"
    how = f"{where} {HOST_MEMORY_GB_S} GB/s of a node, and the way there" if host else f"{where} {bandwidth} TB/s"
    rows.append(Row("optimizer", "optimizer", how, step.optimizer, "s"))
    rows.append(Row("total", "one step", "sum, of the slowest pipeline rank", step.total, "s"))
    return Part("step_time", title, tuple(rows))


def _collectives(traffic: Traffic, gpu: Gpu, group: Group) -> str:
    """`(452 all-gathers of 16.8 MB + ...) over 8 ranks at 360 GB/s, 40 us an all-reduce`."""
    kinds = [
        f"{number} {kind.replace('_', '-')}s of {_bytes(traffic.size[kind] / number)}"
        for kind, number in traffic.number.items()
    ]
    wait = f"{1e6 * latency(gpu, group):g} us an all-reduce"
    return f"({' + '.join(kinds)}) over {group.size} ranks at {_speed_of(gpu, group)}, {wait}"


def _hidden(on: Machine, what: str) -> str:
    if what not in on.software.overlap:
        return ""
    halves = {"tensor": ", half of it behind matmuls", "columns": ", those of columns in backward behind their matmuls"}
    return halves.get(what, ", behind computation where there is enough")


def _bytes(size: float) -> str:
    return f"{size / 1e9:.4g} GB" if size >= 1e9 else f"{size / 1e6:.4g} MB"


def _speed_of(gpu: Gpu, group: Group) -> str:
    return f"{ring_bandwidth(gpu, group) / 1e9:.4g} GB/s"


def _speed(config: RunConfig, world_size: int, on: Machine, step: StepTime) -> Part:
    gpu = on.gpu
    found = speed(config, world_size, gpu, step.total)
    peak = f"of {gpu.peak_tflops} TFLOP/s, {gpu.name}"
    rate, how = found.tokens_per_second, f"{config.tokens_per_step} / {step.total:.4g} s"
    rows = [
        Row("tokens_per_second", "tokens per second", how, rate, decimals=1),
        Row("tokens_per_second_per_gpu", "per GPU", f"/ {world_size}", found.tokens_per_second_per_gpu),
        Row("mfu_full", "MFU, full convention", peak, 100 * found.mfu_full, "%"),
    ]
    if config.train.objective == "causal":
        rows.append(Row("mfu_causal", "MFU, causal convention", peak, 100 * found.mfu_causal, "%"))
    if found.hfu > found.mfu_full:
        rows.append(Row("hfu", "HFU", "full convention, with recomputation", 100 * found.hfu, "%"))
    if found.mfu_attainable is not None:
        how = f"full convention, of {gpu.matmul_tflops} TFLOP/s, the best measured matmul"
        rows.append(Row("mfu_attainable", "MFU of the attainable", how, 100 * found.mfu_attainable, "%"))
    return Part("speed", "Predicted speed", tuple(rows))


def _cost(config: RunConfig, world_size: int, on: Machine, step: StepTime, tokens: float, price: float | None) -> Part:
    cost, gpu = run_cost(config, world_size, on, step.total, tokens, price), on.gpu
    mean = 3600 * cost.hours / cost.steps
    rows = [
        Row("steps", "steps", steps_words(config, tokens), cost.steps),
        Row("hours", "wall time", f"{cost.steps} * {mean:.4g} s, without stops", cost.hours, "h", decimals=2),
        Row("days", "in days", f"{cost.hours:,.2f} h / 24", cost.hours / 24, "d"),
        Row("gpu_hours", "GPU hours", f"{cost.hours:,.2f} h * {world_size}", cost.gpu_hours, "h", decimals=2),
    ]
    if cost.money is not None:
        rows.append(Row("money", "money", f"{cost.gpu_hours:,.2f} h * {price:g}", cost.money, decimals=2))
    if cost.energy_mwh is not None:
        how = f"{cost.gpu_hours:,.2f} h * {gpu.power_w:g} W * PUE {PUE}, GPUs alone"
        rows.append(Row("energy_mwh", "energy", how, cost.energy_mwh, "MWh"))
    return Part("cost", "Predicted cost of the run", tuple(rows))
