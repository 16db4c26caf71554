"""Step time and cost of a run as parts of a plan, each number beside its arithmetic. Pure."""

from __future__ import annotations

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.budget import planned_tokens
from megallama.plan.hardware import Gpu
from megallama.plan.report.table import Part, Row
from megallama.plan.sizing.cost import PUE, run_cost, speed
from megallama.plan.time.communication import (
    NODE_LATENCY,
    Group,
    collective_seconds,
    data_traffic,
    latency,
    ring_bandwidth,
)
from megallama.plan.time.simulation import waiting
from megallama.plan.time.step_time import ATTENTION_RATE, OPTIMIZER_BYTES, StepTime, step_time
from megallama.plan.time.workload import Workload, workload


def time_parts(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    tokens: float | None = None,
    price: float | None = None,
    software: str | None = None,
) -> list[Part]:
    """Step time, speed and cost of a run on `world_size` of `gpu`; `tokens` takes the place of its length.

    `price` is for one GPU and hour, in any currency; `software` names a constant of `gpu`, its first by default.
    UserError if the run is not legal on that many ranks, or where a figure of `gpu` that is needed is not known.
    """
    check_type(config, gpu)
    work = workload(config, world_size)
    step = step_time(work, gpu, software)
    return [
        _step_time(work, step, gpu, gpu.efficiency_for(software)),
        _speed(work, step, gpu),
        _cost(work, step, gpu, planned_tokens(config, tokens), price),
    ]


def check_type(config: RunConfig, gpu: Gpu) -> None:
    """UserError if the peak of `gpu` is of another type than the run's."""
    if config.train.dtype == "fp32" and gpu.kind == "gpu":
        raise UserError(f"train.dtype=fp32 has no step time on {gpu.key}, whose peak is of bf16; use train.dtype=bf16")


def _step_time(work: Workload, step: StepTime, gpu: Gpu, efficiency: float) -> Part:
    bandwidth, rate = gpu.known("memory_tb_s"), gpu.known("peak_tflops") * 1e12 * efficiency
    each = f"{work.micro_batches} micro-batches"
    matmul = f"{each}, {step.matmul * rate:.4g} FLOPs at {efficiency:.1%} of {gpu.peak_tflops} TFLOP/s"
    attention = f"{each}, {step.attention * rate * ATTENTION_RATE:.4g} FLOPs at half that rate"
    memory = f"{each}, {step.memory * bandwidth * 1e12:.4g} B of kernels over {bandwidth} TB/s"
    rows = [
        Row("matmul", "matmuls", matmul, step.matmul, "s"),
        Row("attention", "attention", attention, step.attention, "s"),
        Row("memory", "memory", memory, step.memory, "s"),
        Row("compute", "compute", "matmuls + attention + memory", step.compute, "s"),
    ]
    if work.tp > 1:
        how = f"{each} * {_tensor(work, step, gpu)}"
        rows.append(Row("tensor", "tensor-parallel communication", how, step.tensor, "s"))
    if work.pp > 1:
        how = f"{each} * {_messages(work, gpu)}"
        rows.append(Row("pipeline", "pipeline communication", how, step.pipeline, "s"))
        rows.append(Row("bubble", "bubble", _bubble(work), step.bubble, "s"))
    parameters = step.optimizer * bandwidth * 1e12 * work.dp / OPTIMIZER_BYTES
    if work.dp > 1:
        how = _data(work, step, gpu, parameters)
        rows.append(Row("data", "data-parallel communication", how, step.data, "s"))
    how = f"{OPTIMIZER_BYTES} B * {parameters:.4g} parameters / {work.dp} copies over {bandwidth} TB/s"
    rows.append(Row("optimizer", "optimizer", how, step.optimizer, "s"))
    rows.append(Row("total", "one step", "sum, of the slowest pipeline rank", step.total, "s"))
    return Part("step_time", f"Predicted step time on {work.world_size} x {gpu.name}", tuple(rows))


def _tensor(work: Workload, step: StepTime, gpu: Gpu) -> str:
    """The collectives of a micro-batch. A gather and a scatter are the two halves of an all-reduce."""
    group, size = Group(work.tp), _hidden_states(work)
    one = collective_seconds(gpu, group, 2 * size * (work.tp - 1) / work.tp)
    number = step.tensor / work.micro_batches / one
    what = f"{2 * number:.4g} gathers or scatters" if work.sequence_parallel else f"{number:.4g} all-reduces"
    wait = f"{1e6 * latency(gpu, group):g} us {'a pair' if work.sequence_parallel else 'each'}"
    return f"{what} of {_bytes(size)} over {work.tp} ranks at {_speed_of(gpu, group)}, {wait}"


def _messages(work: Workload, gpu: Gpu) -> str:
    size = _hidden_states(work) / (work.tp if work.sequence_parallel else 1)
    way = _speed_of(gpu, Group(2, work.tp * work.dp))
    return f"{2 * work.chunks} messages of {_bytes(size)} at {way}, {1e6 * NODE_LATENCY:g} us each"


def _bubble(work: Workload) -> str:
    assert work.waiting is not None
    filling = waiting(work.schedule, work.pp, work.chunks, work.micro_batches)
    return f"{work.schedule}, pp {work.pp}: {work.waiting:.4g} of compute and tensor, {filling:.4g} of pipeline"


def _data(work: Workload, step: StepTime, gpu: Gpu, parameters: float) -> str:
    group, traffic = Group(work.dp, work.tp), data_traffic(work, parameters)
    sent = sum(size * (2 if kind == "all_reduce" else 1) for kind, size in traffic.items()) * (work.dp - 1) / work.dp
    number = round((step.data - collective_seconds(gpu, group, sent, 0)) / latency(gpu, group))
    what = " + ".join(f"{kind.replace('_', '-')} {_bytes(size)}" for kind, size in traffic.items())
    way = f"{work.dp} copies at {_speed_of(gpu, group)}"
    return f"{work.data}: {what} over {way}, {number} * {1e6 * latency(gpu, group):g} us"


def _hidden_states(work: Workload) -> int:
    return work.element_bytes * work.micro_batch_size * work.sequence_length * work.shape.hidden_size


def _bytes(size: float) -> str:
    return f"{size / 1e9:.4g} GB" if size >= 1e9 else f"{size / 1e6:.4g} MB"


def _speed_of(gpu: Gpu, group: Group) -> str:
    return f"{ring_bandwidth(gpu, group) / 1e9:.4g} GB/s"


def _speed(work: Workload, step: StepTime, gpu: Gpu) -> Part:
    found = speed(work, gpu, step.total)
    peak = f"of {gpu.peak_tflops} TFLOP/s, {gpu.name}"
    rate = found.tokens_per_second
    rows = [
        Row("tokens_per_second", "tokens per second", f"{work.tokens} / {step.total:.4g} s", rate, decimals=1),
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
        Row("hours", "wall time", f"{cost.steps} * {step.total:.4g} s, without stops", cost.hours, "h", decimals=2),
        Row("days", "in days", f"{cost.hours:,.2f} h / 24", cost.hours / 24, "d"),
        Row("gpu_hours", "GPU hours", f"{cost.hours:,.2f} h * {work.world_size}", cost.gpu_hours, "h", decimals=2),
    ]
    if cost.money is not None:
        rows.append(Row("money", "money", f"{cost.gpu_hours:,.2f} h * {price:g}", cost.money, decimals=2))
    if cost.energy_mwh is not None:
        how = f"{cost.gpu_hours:,.2f} h * {gpu.power_w:g} W * PUE {PUE}, GPUs alone"
        rows.append(Row("energy_mwh", "energy", how, cost.energy_mwh, "MWh"))
    return Part("cost", "Predicted cost of the run", tuple(rows))
