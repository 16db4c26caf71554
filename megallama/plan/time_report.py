"""Step time and cost of a run as parts of a plan, each number beside its arithmetic. Pure."""

from __future__ import annotations

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.plan.bubble import waiting
from megallama.plan.budget import total_steps
from megallama.plan.cost import PUE, run_cost, speed
from megallama.plan.hardware import Gpu
from megallama.plan.step_time import OPTIMIZER_BYTES, StepTime, step_time
from megallama.plan.table import Part, Row
from megallama.plan.workload import Workload, workload


def time_parts(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    tokens: float | None = None,
    price: float | None = None,
    software: str | None = None,
) -> list[Part]:
    """Step time, speed and cost of a run on `world_size` of `gpu`; `tokens` takes the place of train.steps.

    `price` is for one GPU and hour, in any currency; `software` names a constant of `gpu`, its first by default.
    UserError if the run is not legal on that many ranks, or where a figure of `gpu` that is needed is not known.
    """
    check_type(config, gpu)
    work = workload(config, world_size)
    step = step_time(work, gpu, software)
    planned = total_steps(config) * config.tokens_per_step if tokens is None else tokens
    return [
        _step_time(work, step, gpu, gpu.efficiency_for(software)),
        _speed(work, step, gpu),
        _cost(work, step, gpu, planned, price),
    ]


def check_type(config: RunConfig, gpu: Gpu) -> None:
    """UserError if the peak of `gpu` is of another type than the run's."""
    if config.train.dtype == "fp32" and gpu.kind == "gpu":
        raise UserError(f"train.dtype=fp32 has no step time on {gpu.key}, whose peak is of bf16; use train.dtype=bf16")


def _step_time(work: Workload, step: StepTime, gpu: Gpu, efficiency: float) -> Part:
    m = work.micro_batches
    bandwidth = f"{gpu.known('memory_tb_s')} TB/s"
    each = f"{m} micro-batches"
    rows = [
        Row("matmul", "matmuls", f"{each}, at {efficiency:.1%} of {gpu.peak_tflops} TFLOP/s", step.matmul, "s"),
        Row("attention", "attention", f"{each}, at half that rate", step.attention, "s"),
        Row("memory", "memory", f"{each}, bytes of kernels over {bandwidth}", step.memory, "s"),
        Row("compute", "compute", "matmuls + attention + memory", step.compute, "s"),
    ]
    if work.tp > 1:
        how = f"{each}, all-reduces of {work.micro_batch_size} * {work.sequence_length} * {work.shape.hidden_size}"
        rows.append(Row("tensor", "tensor-parallel communication", f"{how} over {work.tp} ranks", step.tensor, "s"))
    if work.pp > 1:
        share = waiting(work.schedule, work.pp, work.chunks, m)
        messages = f"{each}, {2 * work.chunks} messages each"
        rows.append(Row("pipeline", "pipeline communication", messages, step.pipeline, "s"))
        how = f"{work.schedule}, pp {work.pp}: {share:.4g} of the other ranks' work"
        rows.append(Row("bubble", "bubble", how, step.bubble, "s"))
    if work.dp > 1:
        rows.append(Row("data", "data-parallel communication", f"{work.data} over {work.dp} copies", step.data, "s"))
    how = f"{OPTIMIZER_BYTES} B per parameter of a rank's part over {bandwidth}"
    rows.append(Row("optimizer", "optimizer", how, step.optimizer, "s"))
    rows.append(Row("total", "one step", "sum, of the slowest pipeline rank", step.total, "s"))
    return Part("step_time", f"Predicted step time on {work.world_size} x {gpu.name}", tuple(rows))


def _speed(work: Workload, step: StepTime, gpu: Gpu) -> Part:
    found = speed(work, gpu, step.total)
    peak = f"of {gpu.peak_tflops} TFLOP/s, {gpu.name}"
    rate = found.tokens_per_second
    rows = [
        Row("tokens_per_second", "tokens per second", f"{work.tokens} / {step.total:.4g} s", rate),
        Row("tokens_per_second_per_gpu", "per GPU", f"/ {work.world_size}", found.tokens_per_second_per_gpu),
        Row("mfu_full", "MFU, full convention", peak, 100 * found.mfu_full, "%"),
        Row("mfu_causal", "MFU, causal convention", peak, 100 * found.mfu_causal, "%"),
    ]
    if found.hfu > found.mfu_full:
        rows.append(Row("hfu", "HFU", "full convention, with recomputation", 100 * found.hfu, "%"))
    if found.mfu_attainable is not None:
        how = f"full convention, of {gpu.matmul_tflops} TFLOP/s, the best measured matmul"
        rows.append(Row("mfu_attainable", "MFU of the attainable", how, 100 * found.mfu_attainable, "%"))
    return Part("speed", "Predicted speed", tuple(rows))


def _cost(work: Workload, step: StepTime, gpu: Gpu, tokens: float, price: float | None) -> Part:
    cost = run_cost(work, gpu, step.total, tokens, price)
    rows = [
        Row("steps", "steps", f"{tokens:.4g} tokens / {work.tokens}, up", cost.steps),
        Row("hours", "wall time", f"{cost.steps} * {step.total:.4g} s, without stops", cost.hours, "h"),
        Row("days", "in days", f"{cost.hours:.4g} h / 24", cost.hours / 24, "d"),
        Row("gpu_hours", "GPU hours", f"{cost.hours:.4g} h * {work.world_size}", cost.gpu_hours, "h"),
    ]
    if cost.money is not None:
        rows.append(Row("money", "money", f"{cost.gpu_hours:.4g} h * {price:g}", cost.money))
    if cost.energy_mwh is not None:
        how = f"{cost.gpu_hours:.4g} h * {gpu.power_w:g} W * PUE {PUE}, GPUs alone"
        rows.append(Row("energy_mwh", "energy", how, cost.energy_mwh, "MWh"))
    return Part("cost", "Predicted cost of the run", tuple(rows))
