"""Predicted seconds of one optimizer step, term by term. Pure.

One constant is fitted, for each GPU and generation of software: the share of the peak at which matmuls run. All else is
counted: FLOPs, and bytes over published bandwidths. docs/planning.md has the errors against published runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megallama.plan.hardware import Gpu
from megallama.plan.time.communication import Group, collective_seconds, data_traffic, message_seconds
from megallama.plan.time.kernels import kernel_work
from megallama.plan.time.simulation import waiting
from megallama.plan.time.workload import Workload

# AdamW reads the gradient, the master weight and both moments in fp32 and writes the last three: 28 bytes.
OPTIMIZER_BYTES = 28

# FlashAttention-2 reaches 35 % of an H100's peak (arXiv 2407.08608, abstract) where matmuls reach 80 %, the first
# FlashAttention 25 to 50 % of an A100's (arXiv 2307.08691, section 1) where they reach 87 %: about half.
ATTENTION_RATE = 0.5

# Of tensor-parallel collectives cut in pieces, what passes behind matmuls. All but one of tp pieces could (arXiv
# 2210.03588); torchtitan's asynchronous tensor parallelism takes 9 % off a step at tp 8, a third of what collectives
# take of it here (benchmarks/asyncTP_llama3_h100_2025-06). Half is between the two.
TENSOR_HIDDEN = 0.5


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the pipeline rank that sets the pace; they add up."""

    matmul: float
    attention: float
    memory: float
    """What matmuls, norms, rotations, activations, the loss and sums of gradients wait for memory."""
    tensor: float
    """Tensor-parallel collectives that computation does not hide."""
    pipeline: float
    """Messages between stages."""
    bubble: float
    """Waiting in the pipeline."""
    data: float
    """Gradients and weights between data-parallel copies that computation does not hide."""
    optimizer: float
    """AdamW over this rank's part of the state."""

    @property
    def compute(self) -> float:
        """What would be left on one GPU, but for the optimizer."""
        return self.matmul + self.attention + self.memory

    @property
    def total(self) -> float:
        """Seconds per optimizer step."""
        return self.compute + self.tensor + self.pipeline + self.bubble + self.data + self.optimizer


@dataclass(frozen=True)
class _MicroBatch:
    """Seconds of one micro-batch on one pipeline rank."""

    matmul: float
    attention: float
    memory: float
    tensor: float

    @property
    def compute(self) -> float:
        return self.matmul + self.attention + self.memory

    @property
    def total(self) -> float:
        return self.compute + self.tensor


def step_time(work: Workload, gpu: Gpu, software: str | None = None) -> StepTime:
    """Seconds of one step of `work` on `gpu` with the efficiency of that generation of `software`.

    UserError where a figure of `gpu` that is needed is not known.
    """
    return step_time_at(work, gpu, gpu.efficiency_for(software))


def step_time_at(work: Workload, gpu: Gpu, efficiency: float) -> StepTime:
    """`step_time` where matmuls run at a given share of the peak."""
    each = _micro_batches(work, gpu, efficiency)
    slowest = max(each, key=lambda rank: rank.total)
    m, bandwidth = work.micro_batches, gpu.known("memory_tb_s") * 1e12
    messages = _messages(work, gpu, slowest.compute)
    bubble = _bubble(work, each, messages)
    parameters = max(_parameters(work))
    return StepTime(
        matmul=m * slowest.matmul,
        attention=m * slowest.attention,
        memory=m * slowest.memory,
        tensor=m * slowest.tensor,
        pipeline=m * messages,
        bubble=bubble,
        data=_data(work, gpu, parameters, slowest.compute, bubble),
        optimizer=OPTIMIZER_BYTES * parameters / _optimizer_ranks(work) / bandwidth,
    )


def _micro_batches(work: Workload, gpu: Gpu, efficiency: float) -> list[_MicroBatch]:
    rate = gpu.known("peak_tflops") * 1e12 * efficiency
    bandwidth = gpu.known("memory_tb_s") * 1e12
    return [
        _MicroBatch(
            matmul=kernels.matmul_flops / rate,
            attention=kernels.attention_flops / (rate * ATTENTION_RATE),
            memory=(kernels.matmul_bytes + kernels.other_bytes + work.sum_bytes * parameters) / bandwidth,
            tensor=_tensor(work, gpu, rank),
        )
        for rank, (kernels, parameters) in enumerate(zip(kernel_work(work), _parameters(work), strict=True))
    ]


def _bubble(work: Workload, each: list[_MicroBatch], messages: float) -> float:
    """Seconds for which the slowest rank waits: as simulated, or for the others, as a micro-batch passes through them.

    With 1F1B a step takes sum(t) + (m - 1) * max(t) for stages that take t, exact where the last is the slowest.
    """
    if work.pp == 1:
        return 0.0
    filling = waiting(work.schedule, work.pp, work.chunks, work.micro_batches) * work.micro_batches
    if work.waiting is not None:
        return work.waiting * work.micro_batches * max(rank.total for rank in each) + filling * messages
    times = [rank.total for rank in each]
    other = (sum(times) - max(times)) / (work.pp - 1)
    return filling * (other + messages)


def _tensor(work: Workload, gpu: Gpu, rank: int) -> float:
    """Seconds of tensor-parallel collectives in one micro-batch on a pipeline rank, less what is hidden.

    A layer has 4 all-reduces of the hidden states (arXiv 1909.08053, section 3). With sequence parallelism each is a
    scatter and a gather, and column inputs are gathered twice more in backward (arXiv 2205.05198, section 4.2.2). A
    forward that is computed again needs the attention's sum, not the MLP's. Keys and values whose heads tp does not
    divide are gathered, and their gradients scattered. A gather counts as half an all-reduce.
    """
    tp = work.tp
    if tp == 1:
        return 0.0
    again, cut = work.layer_recompute_fraction, work.sequence_parallel
    per_layer = 4 + again + (1 + again / 2 if cut else 0)
    # The embedding and the head have one all-reduce each.
    reductions = work.stages[rank] * per_layer + (rank == 0) + (rank == work.head)
    heads = work.stages[rank] * (2 + again) if work.gathers_heads else 0
    sent = 2 * (reductions * _hidden_states(work) + heads * _keys(work)) * (tp - 1) / tp
    seconds = collective_seconds(gpu, Group(tp), sent, reductions + heads)
    return seconds * (1 - TENSOR_HIDDEN) if "tensor" in work.overlapped else seconds


def _messages(work: Workload, gpu: Gpu, compute: float) -> float:
    """Seconds of messages to the next stage and back in one micro-batch, less what computation hides."""
    if work.pp == 1:
        return 0.0
    cut = work.tp if work.sequence_parallel else 1
    seconds = message_seconds(gpu, work.tp * work.dp, _hidden_states(work) / cut, count=2 * work.chunks)
    return max(0.0, seconds - compute) if "pipeline" in work.overlapped else seconds


def _data(work: Workload, gpu: Gpu, parameters: float, compute: float, bubble: float) -> float:
    """Seconds in which gradients are summed over the copies and weights gathered, less what computation hides.

    Where it overlaps, it hides behind the `compute` of one micro-batch, since gradients are complete in the last, and
    behind all of them with ZeRO 2 and 3.
    """
    traffic, m = data_traffic(work, parameters), work.micro_batches
    # An all-reduce is a scatter and a gather (arXiv 1910.02054, section 7.1).
    sent = sum(size * (2 if kind == "all_reduce" else 1) for kind, size in traffic.items())
    rounds = {"zero2": m + 1, "zero3": 3 * m}.get(work.data, 2)
    count = rounds * ceil(parameters / work.bucket_elements)
    # Tensor-parallel ranks are neighbours, so that copies stand tp apart.
    group = Group(work.dp, work.tp)
    seconds = collective_seconds(gpu, group, sent * (work.dp - 1) / work.dp, count)
    if "data" not in work.overlapped:
        return seconds
    if work.data in ("zero2", "zero3"):
        return max(0.0, seconds - m * compute)
    # With several chunks all but the last are complete while the pipeline drains.
    return max(0.0, seconds - (compute if work.chunks == 1 else min(m, work.pp) * compute + bubble))


def _hidden_states(work: Workload) -> int:
    """Bytes of one micro-batch between two layers."""
    return work.element_bytes * work.micro_batch_size * work.sequence_length * work.shape.hidden_size


def _keys(work: Workload) -> int:
    """Bytes of the keys, or the values, of all heads in one micro-batch."""
    return work.element_bytes * work.micro_batch_size * work.sequence_length * work.shape.kv_width


def _parameters(work: Workload) -> list[float]:
    """Weights on each pipeline rank; the norms, a ten thousandth, are left out."""
    shape = work.shape
    held = [layers * shape.matmul_per_layer for layers in work.stages]
    held[0] += shape.head
    if not (shape.tied and work.head == 0):
        held[work.head] += shape.head
    return [parameters / work.tp for parameters in held]


def _optimizer_ranks(work: Workload) -> int:
    return 1 if work.data == "all-reduce" else work.dp
