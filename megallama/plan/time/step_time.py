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
from megallama.layout.check import check_batching
from megallama.layout.counts import flops_per_token
from megallama.layout.frozen import frozen_matmul
from megallama.layout.schedules import schedule_of
from megallama.layout.stages import Stage, stages
from megallama.plan.memory.activations import tensors
from megallama.plan.memory.state import rank_parameters
from megallama.plan.memory.traffic import Traffic, context_traffic, stage_traffic
from megallama.plan.time.communication import Group, collective_seconds, data_traffic, message_seconds
from megallama.plan.time.kernels import KernelWork, head_work, layer_work, spared_work
from megallama.plan.time.simulation import simulated_waiting, waiting
from megallama.plan.time.software import Machine

# AdamW reads the gradient, the master weight and both moments in fp32 and writes the last three: 28 bytes.
OPTIMIZER_BYTES = 28

# Of tensor-parallel collectives cut in pieces, what passes behind matmuls. All but one of tp pieces could (arXiv
# 2210.03588); torchtitan's asynchronous tensor parallelism takes 9 % off a step at tp 8, a third of what collectives
# take of it here (benchmarks/asyncTP_llama3_h100_2025-06). Half is between the two.
TENSOR_HIDDEN = 0.5

HOST_GB_S = 25
"""One way between a GPU and its host. An assumption: PCIe 4 with 16 lanes has 32, and copies reach some 25."""


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
    """AdamW over this rank's part of the state."""
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
    context: Traffic
    """Context-parallel."""
    messages: int
    """Sent to other ranks: hidden states to the stage after, their gradients to the stage before."""
    moved: int = 0
    """Bytes that go to the host or come back."""

    def seconds(self, on: Machine, config: RunConfig) -> StepTime:
        """The seconds of it, messages aside."""
        tensor = collective_seconds(on.gpu, Group(config.parallel.tensor), self.traffic)
        rate = on.matmul_flops
        found = StepTime(
            matmul=self.kernels.matmul_flops / rate,
            attention=self.kernels.attention_flops / (rate * on.software.attention_rate(on.gpu)),
            memory=(self.kernels.bytes_moved + self.sums) / (on.gpu.known("memory_tb_s") * 1e12),
            tensor=tensor * (1 - TENSOR_HIDDEN) if "tensor" in on.software.overlap else tensor,
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


def rank_works(config: RunConfig, on: Machine) -> list[RankWork]:
    """The work of each pipeline rank in one micro-batch."""
    of, every = tensors(config), stages(config)
    backwards = 2 if schedule_of(config.parallel).splits_backward == "always" else 1
    layer, head = layer_work(config, of, on.software), head_work(config, of, on.software)
    # In fp32 autograd adds in place.
    sums = 0.0 if not on.software.sums else on.software.sums if config.train.dtype == "bf16" else 12.0
    found = []
    for rank in rank_parameters(config):
        mine = [every[index] for index in rank.stages]
        trained = rank.total - rank.frozen
        last = every[-1] in mine
        kernels = layer.times(rank.layers) + (head if last else KernelWork())
        found.append(
            RankWork(
                kernels=kernels + spared_work(config, of, mine, last).times(-1),
                sums=sums * trained,
                parameters=trained,
                traffic=sum((stage_traffic(config, one, len(every), backwards) for one in mine), Traffic()),
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
    if on.mfu is not None:
        each = flops_per_token(config.model, config.data.sequence_length, frozen=frozen_matmul(config))
        flops = config.tokens_per_step * each
        return StepTime(flops / (world_size * on.gpu.known("peak_tflops") * 1e12 * on.mfu), assumed=True)
    m, dp = batching.gradient_accumulation_steps, batching.dp_size
    works = rank_works(config, on)
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
        tensor=m * slowest.tensor,
        context=m * slowest.context,
        pipeline=m * messages,
        bubble=bubble,
        data=_data(config, on, parameters, group, m, slowest.compute, bubble),
        optimizer=OPTIMIZER_BYTES * parameters / sharing / (on.gpu.known("memory_tb_s") * 1e12),
    )


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
    drains.
    """
    traffic = data_traffic(config, on.software, parameters, micro_batches)
    seconds = collective_seconds(on.gpu, group, traffic)
    if "data" not in on.software.overlap:
        return seconds
    if config.zero.stage > 1:
        return max(seconds / config.model.num_hidden_layers, seconds - micro_batches * compute)
    several = len(stages(config)) > config.parallel.pipeline
    behind = min(micro_batches, config.parallel.pipeline) * compute + bubble if several else compute
    return max(0.0, seconds - behind)
