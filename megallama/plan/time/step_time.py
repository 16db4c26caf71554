"""Predicted seconds of one optimizer step, term by term. Pure.

One constant is fitted, for each GPU and generation of software: the share of the peak at which matmuls run. All else
is counted: FLOPs, bytes, collectives and messages as the layers issue them, over published bandwidths. What is assumed
of the software is in `software.yaml`; docs/planning.md has the errors against published runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.check import check_batching
from megallama.layout.counts import flops_per_token
from megallama.layout.frozen import frozen_matmul
from megallama.layout.schedules import schedule_of
from megallama.layout.stages import Stage, stages
from megallama.plan.memory.activations import tensors
from megallama.plan.memory.state import rank_parameters
from megallama.plan.memory.traffic import Traffic, beside_matmuls, context_traffic, stage_traffic, step_traffic
from megallama.plan.time.communication import Group, collective_seconds, data_traffic, message_seconds
from megallama.plan.time.kernels import KernelWork, head_work, layer_work, spared_work
from megallama.plan.time.simulation import simulated_waiting, waiting
from megallama.plan.time.software import Machine, Software

# AdamW reads the gradient, the master weight and both moments in fp32 and writes the last three: 28 bytes. An
# exponential average is another pass, which reads the master and the average, and writes the average.
_ADAMW_BYTES, _AVERAGE_BYTES = 28, 12
_NORM_BYTES = 4
_CLIP_BYTES = 4
"""torch's fused AdamW writes back the gradient that it clips."""

# Of tensor-parallel collectives cut in pieces, what passes behind matmuls. All but one of tp pieces could (arXiv
# 2210.03588); torchtitan's asynchronous tensor parallelism takes 9 % off a step at tp 8, a third of what collectives
# take of it here (benchmarks/asyncTP_llama3_h100_2025-06). Half is between the two.
TENSOR_HIDDEN = 0.5

BACKWARD = 2 / 3
"""Of the time that a micro-batch computes; recomputation, which makes it more, is not counted."""
HOST_GB_S = 25
"""One way between a GPU and its host. An assumption: PCIe 4 with 16 lanes has 32, and copies reach some 25."""
FP8_RATE = 2
"""Matmuls in fp8 over those in bf16: the ratio of their peaks, on every GPU that has both."""
PAGEABLE_GB_S = 6
"""The same for host memory that is not pinned. An assumption."""
HOST_MEMORY_GB_S = 40
"""Of the host's memory. An assumption: two channels of DDR4-3200 have 51, of DDR5-5600 90."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the pipeline rank that sets the pace; they add up."""

    matmul: float
    attention: float = 0.0
    memory: float = 0.0
    """What matmuls, norms, rotations, activations, the loss and sums of gradients wait for memory or copies."""
    tensor: float = 0.0
    """Tensor-parallel collectives that computation does not hide."""
    context: float = 0.0
    """Context-parallel collectives."""
    pipeline: float = 0.0
    """Messages between stages."""
    bubble: float = 0.0
    """Waiting in the pipeline."""
    data: float = 0.0
    """Gradients and weights between data-parallel copies that computation does not hide."""
    optimizer: float = 0.0
    """AdamW, and the average of the weights, over this rank's part of the state."""
    assumed: bool = False
    """All of it follows from an MFU that was given, and stands under `matmul`."""

    @property
    def compute(self) -> float:
        """What would be left on one GPU, but for the optimizer."""
        return self.matmul + self.attention + self.memory

    @property
    def total(self) -> float:
        """Seconds per optimizer step."""
        return self.busy + self.pipeline + self.bubble + self.data + self.optimizer

    @property
    def busy(self) -> float:
        """What a stage takes for its micro-batches, but for messages."""
        return self.compute + self.tensor + self.context


@dataclass(frozen=True)
class RankWork:
    """One micro-batch on one pipeline rank: what it computes and sends."""

    kernels: KernelWork
    sums: float
    """Bytes moved to add up gradients, beyond what matmuls write."""
    parameters: int
    """Those that are trained."""
    traffic: Traffic
    """Tensor-parallel."""
    beside: Traffic
    """Those of it that run beside matmuls."""
    beside_flops: float
    """Of these matmuls."""
    once: Traffic
    """Tensor-parallel, once in a step."""
    context: Traffic
    """Context-parallel."""
    messages: int
    """Sent to other ranks: hidden states to the stage after, their gradients to the stage before."""
    moved: int = 0
    """Bytes that go to the host or come back."""

    def seconds(self, on: Machine, config: RunConfig) -> StepTime:
        """The seconds of it, messages aside."""
        rate, group = on.matmul_flops, Group(config.parallel.tensor)
        tensor = collective_seconds(on.gpu, group, self.traffic)
        if "tensor" in on.software.overlap:
            tensor *= 1 - TENSOR_HIDDEN
        elif "columns" in on.software.overlap:
            tensor -= min(collective_seconds(on.gpu, group, self.beside), self.beside_flops / rate)
        found = StepTime(
            matmul=(self.kernels.matmul_flops + self.kernels.fp8_flops / FP8_RATE) / rate,
            attention=self.kernels.attention_flops / (rate * on.software.attention_rate(on.gpu)),
            memory=(self.kernels.bytes_moved + self.sums) / (on.gpu.known("memory_tb_s") * 1e12),
            tensor=tensor,
            context=collective_seconds(on.gpu, context_group(config), self.context),
        )
        waits = max(0.0, self.moved / (HOST_GB_S * 1e9) - found.compute)
        return replace(found, memory=found.memory + waits)


def context_group(config: RunConfig) -> Group:
    """The ranks that share a sequence: tensor-parallel ones stand between them."""
    return Group(config.parallel.context, config.parallel.tensor)


def data_group(config: RunConfig, dp: int) -> Group:
    """The ranks over which gradients are summed and ZeRO cuts: `dp` copies, and those that share a sequence."""
    return Group(dp * config.parallel.context, config.parallel.tensor)


def sum_bytes(config: RunConfig, software: Software, micro_batches: int) -> float:
    """Bytes moved for each parameter to add the gradients of one of so many micro-batches up, where that is a pass.

    At ZeRO 1 the first gradient of a step is copied and later ones are added (train/gradient_sums.py); at ZeRO 2 and 3
    DeepSpeed casts each to fp32 first, and in fp32 autograd adds in place.
    """
    bf16 = config.train.dtype == "bf16"
    if software.sums and software.gradients == "zero" and config.zero.stage == 1:
        first, later = (6, 10) if bf16 else (8, 12)
        return (first + (micro_batches - 1) * later) / micro_batches
    return 0.0 if not software.sums else software.sums if bf16 else 12.0


def rank_works(config: RunConfig, on: Machine, micro_batches: int) -> list[RankWork]:
    """The work of each pipeline rank in one of the `micro_batches` of a step."""
    of, every = tensors(config), stages(config)
    backwards = 2 if schedule_of(config.parallel).splits_backward == "always" else 1
    layer, head = layer_work(config, of, on.software), head_work(config, of, on.software)
    found, sums = [], sum_bytes(config, on.software, micro_batches)
    for rank in rank_parameters(config):
        mine = [every[index] for index in rank.stages]
        trained = rank.total - rank.frozen
        last = every[-1] in mine
        kernels = layer.times(rank.layers) + (head if last else KernelWork())
        found.append(
            RankWork(
                kernels=kernels + spared_work(config, of, on.software, mine, last).times(-1),
                sums=sums * trained,
                parameters=trained,
                traffic=sum((stage_traffic(config, one, len(every), backwards) for one in mine), Traffic()),
                beside=beside_matmuls(config, rank.layers),
                beside_flops=rank.layers * 4.0 * of.positions * of.hidden * (of.qkv + of.up),
                once=step_traffic(config, mine, len(every)),
                context=context_traffic(config, rank.layers, backwards),
                messages=_messages(every, rank.rank),
                moved=2 * rank.layers * of.state if config.train.recompute == "offload" else 0,
            )
        )
    return found


def slowest_work(works: Sequence[RankWork], config: RunConfig, on: Machine) -> RankWork:
    """The one that sets the pace of the pipeline."""
    return max(works, key=lambda work: work.seconds(on, config).total)


def step_time(config: RunConfig, world_size: int, on: Machine, *, simulated: bool = True) -> StepTime:
    """Seconds of one step of a run on `world_size` ranks.

    Waiting in the pipeline is `simulated` from the orders that training runs; without, it is that of equal stages,
    which takes no time to compute. UserError if the run is not legal there, or where a figure of the GPU that is needed
    is not known.
    """
    batching = check_batching(config, world_size)
    if config.train.matmul == "fp8" and not on.gpu.fp8:
        raise UserError(f"train.matmul=fp8 does not go with {on.gpu.key}, which has no fp8; use train.matmul=dtype")
    if on.mfu is not None:
        each = flops_per_token(config.model, config.data.sequence_length, frozen=frozen_matmul(config))
        flops = config.tokens_per_step * each
        return StepTime(flops / (world_size * on.gpu.known("peak_tflops") * 1e12 * on.mfu), assumed=True)
    m, dp = batching.gradient_accumulation_steps, batching.dp_size
    works = rank_works(config, on, m)
    work = slowest_work(works, config, on)
    slowest, group = work.seconds(on, config), data_group(config, dp)
    # The busiest rank's: whoever computes the most waits for its neighbours' messages as well.
    number = max(work.messages for work in works)
    messages = number * message_seconds(on.gpu, group.size * group.stride, tensors(config).state) if number else 0.0
    if "pipeline" in on.software.overlap:
        messages = max(0.0, messages - slowest.compute)
    waits = (simulated_waiting if simulated else waiting)(config, m)
    bubble = waits * m * (slowest.total + messages)
    parameters, sharing = max(work.parameters for work in works), on.software.optimizer_ranks(group.size)
    return StepTime(
        matmul=m * slowest.matmul,
        attention=m * slowest.attention,
        memory=m * slowest.memory,
        tensor=m * slowest.tensor + collective_seconds(on.gpu, Group(config.parallel.tensor), work.once),
        context=m * slowest.context,
        pipeline=m * messages,
        bubble=bubble,
        data=_data(config, on, parameters, group, m, slowest.compute, bubble),
        optimizer=optimizer_seconds(config, on, parameters / sharing, world_size),
    )


def optimizer_seconds(config: RunConfig, on: Machine, parameters: float, world_size: int) -> float:
    """The update of so many parameters; on the host, gradients go there first and weights come back after it.

    The ranks of a node share the memory of their host, and each has a way there of its own.
    """
    moved = optimizer_bytes(config, on.software) * parameters
    if config.zero.offload_optimizer == "none":
        return moved / (on.gpu.known("memory_tb_s") * 1e12)
    crossing = 4 + (2 if config.train.dtype == "bf16" else 4)
    sharing = min(world_size, int(on.gpu.gpus_per_node or 1))
    return sharing * moved / (HOST_MEMORY_GB_S * 1e9) + crossing * parameters / (PAGEABLE_GB_S * 1e9)


def optimizer_bytes(config: RunConfig, software: Software) -> int:
    """Bytes that an update moves for each parameter.

    Of megallama (train/zero.py) all: AdamW's own, the norm, the clip, the weights, which in fp32 at ZeRO 1 are the
    masters themselves, and the flat copy of gradients that DeepSpeed makes at ZeRO 2 in fp32 and at ZeRO 3.
    """
    average = _AVERAGE_BYTES if config.train.average.kind == "exponential" else 0
    if software.gradients != "zero":
        return _ADAMW_BYTES + average
    bf16, stage = config.train.dtype == "bf16", config.zero.stage
    weights = 6 if bf16 else 0 if stage == 1 else 8
    flat = 8 if stage == 3 or (stage == 2 and not bf16) else 0
    return _NORM_BYTES + _ADAMW_BYTES + _CLIP_BYTES + weights + flat + average


def _messages(every: Sequence[Stage], rank: int) -> int:
    """Messages that leave a rank: to the stage after, and gradients to the stage before, where that is on another."""
    return sum((one.rank == rank) + (other.rank == rank) for one, other in pairwise(every) if one.rank != other.rank)


def _data(
    config: RunConfig, on: Machine, parameters: int, group: Group, micro_batches: int, compute: float, bubble: float
) -> float:
    """Seconds in which gradients are summed over the copies and weights gathered, less what computation hides.

    Where it overlaps, it hides behind the `compute` of one micro-batch, since gradients are complete in the last, and
    behind all of them with ZeRO 2 and 3, but for a layer's part: the first gather and the last scatter of a micro-batch
    have nothing beside them. With several stages on a rank all but the last are complete while the pipeline
    drains. megallama at ZeRO 1 hides the sums, behind backwards, but for the group of the first weights, and not the
    gather.
    """
    traffic = data_traffic(config, on.software, parameters, micro_batches)
    seconds = collective_seconds(on.gpu, group, traffic)
    several = len(stages(config)) > config.parallel.pipeline
    behind = min(micro_batches, config.parallel.pipeline) * compute + bubble if several else compute
    if on.software.gradients == "zero" and config.zero.stage == 1:
        sums = collective_seconds(on.gpu, group, traffic.only("reduce_scatter"))
        return seconds - sums + max(sums / traffic.number["reduce_scatter"], sums - BACKWARD * behind)
    if "data" not in on.software.overlap:
        return seconds
    if config.zero.stage > 1:
        return max(seconds / config.model.num_hidden_layers, seconds - micro_batches * compute)
    return max(0.0, seconds - behind)
