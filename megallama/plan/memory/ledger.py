"""The memory of one rank at each place of the pipeline, row by row, at the fullest moment of a step. Pure.

Everything but the overhead is what the allocator hands out (`torch.cuda.max_memory_allocated`). The rows add up to the
peak: each is what it takes at that moment, and not its own maximum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import mul

from megallama.config.schema import RunConfig
from megallama.layout.batching import dp_size, gradient_accumulation_steps
from megallama.layout.schedules import Kind
from megallama.layout.stages import Stage, stages
from megallama.plan.memory.activations import (
    StageBytes,
    Tensors,
    largest_weight,
    layer_backward_bytes,
    layer_weights_bytes,
    logits_bytes,
    loss_backward_bytes,
    loss_forward_bytes,
    stage_bytes,
    tensors,
)
from megallama.plan.memory.in_flight import Moment, fullest
from megallama.plan.memory.state import GIB, MemoryRow, RankParameters, offloaded_rows, rank_parameters, state_rows
from megallama.plan.memory.zero_buffers import (
    RankWeights,
    after_backward,
    buffer_row,
    own_gradients,
    reduced_bytes,
    start_bytes,
)

CONTEXT = GIB // 2
"""A process's CUDA context with torch's kernels. An assumption: 0.3 to 0.5 GB are reported."""
COMMUNICATOR = GIB // 2
"""NCCL's buffers for one group of ranks. An assumption: about 0.5 GB are reported."""
SLACK = 0.05
"""Part of all but the state, in blocks that do not fit. An assumption: 3 to 8 % are reported."""


@dataclass(frozen=True)
class Peak:
    """Bytes that a step holds beside state and buffers at its fullest."""

    at: str
    activations: int
    how: str
    waiting: int = 0
    """Gradients kept between the two parts of split backwards."""
    logits: int = 0
    """With the gradients that the loss keeps of the head's input and weight."""
    transients: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.waiting + self.logits + self.transients


def memory_rows(config: RunConfig, dp_size: int) -> list[list[MemoryRow]]:
    """The rows of a rank at each place of the pipeline; their sum is what its device must have.

    UserError if the batch does not divide over `dp_size` copies.
    """
    count, ranks = gradient_accumulation_steps(config, dp_size), dp_size * config.parallel.context
    moments = fullest(config.parallel, count)
    every, of = stages(config), tensors(config)
    kept = [stage_bytes(config, of, stage, len(every)) for stage in every]
    found = []
    for rank, here in zip(rank_parameters(config), moments, strict=True):
        mine = {index: kept[index] for index in rank.stages}
        # What ZeRO sends and copies; ZeRO 3 gathers frozen weights as well.
        weights = RankWeights(rank.total - rank.frozen * (config.zero.stage < 3), largest_weight(of), ranks)
        reduced = reduced_bytes(config, weights, count)
        meanwhile = reduced if weights.total > config.zero.bucket_elements else 0
        meanwhile += own_gradients(config, of, weights, sum(each.total for each in mine.values()))
        peak = fullest_peak(of, config.train.recompute, here, mine, meanwhile)
        buffers = buffer_row(config, of, weights, messages(every, rank.rank))
        held = held_rows(config, rank, ranks)
        start = start_bytes(config, weights) - sum(row.size for row in held)
        for at, size in (after_backward(config, weights, reduced), ("start", start)):
            if size > peak.total + buffers.size:
                peak, buffers = Peak(at, 0, "none", transients=size), replace(buffers, how=f"in the {at} none", size=0)
        found.append([*held, *_peak_rows(peak), buffers, overhead(config, dp_size, peak.total + buffers.size)])
    return found


def host_rows(config: RunConfig, dp_size: int) -> list[list[MemoryRow]]:
    """Host memory of a rank at each place of the pipeline, beside its process.

    State of the optimizer for `zero.offload_optimizer: cpu`; inputs of layers for `train.recompute: offload`; an
    average of checkpoints and, at a save, the weights of one.
    """
    moments = fullest(config.parallel, gradient_accumulation_steps(config, dp_size))
    every, of = stages(config), tensors(config)
    offloads = config.train.recompute == "offload" and config.train.device != "cpu"
    each = 1 << (of.state - 1).bit_length() if offloads else 0  # as torch gives pinned memory
    found, ranks = list[list[MemoryRow]](), dp_size * config.parallel.context
    for rank, here in zip(rank_parameters(config), moments, strict=True):
        layers = [each * len(every[index].layers) for index in rank.stages]
        inputs = max(sum(map(mul, at.kept, layers)) for at in here)
        mine = -(-(rank.total - rank.frozen) // ranks) if config.train.average.kind == "latest" else 0
        rows = (
            *offloaded_state(config, rank, ranks),
            MemoryRow(
                "host_memory", "inputs of layers in flight", "pinned, in powers of two, of the fullest rank", inputs
            ),
            MemoryRow("host_average", "average of checkpoints", f"4 B * {mine}, as much again at a save", 8 * mine),
        )
        found.append([row for row in rows if row.size])
    return found


def host_bytes(config: RunConfig, dp_size: int) -> list[int]:
    """The bytes of it."""
    return [sum(row.size for row in rows) for rows in host_rows(config, dp_size)]


def rank_bytes(config: RunConfig, world_size: int) -> list[int]:
    """What the device of a rank at each place of the pipeline must have."""
    return [sum(row.size for row in rows) for rows in memory_rows(config, dp_size(config, world_size))]


def held_rows(config: RunConfig, rank: RankParameters, ranks: int) -> list[MemoryRow]:
    """State that lies on the rank, of which ZeRO cuts some over `ranks`; what only fills up in a row of its own."""
    dtype, stage, offloaded = config.train.dtype, config.zero.stage, config.zero.offload_optimizer == "cpu"
    more = {"averaged": config.train.average.kind == "exponential", "offloaded": offloaded}
    rows = state_rows(dtype, stage, rank.sharded + rank.replicated, ranks, rank.frozen, **more)
    fillers = _fillers(rank, ranks)
    padding = sum(row.size for row in state_rows(dtype, stage, fillers, ranks, **more))
    words = f"{rank.padding} vocabulary rows' and {fillers - rank.padding} ZeRO's elements, all kinds"
    return [*rows, MemoryRow("padding", "padding", words, padding)]


def offloaded_state(config: RunConfig, rank: RankParameters, ranks: int) -> list[MemoryRow]:
    """State of the rank that lies in host memory, with what only fills up; none without an offload."""
    if config.zero.offload_optimizer == "none":
        return []
    trained = rank.sharded + rank.replicated - rank.frozen + _fillers(rank, ranks)
    averaged = config.train.average.kind == "exponential"
    return [replace(row, key=f"host_{row.key}") for row in offloaded_rows(trained, ranks, averaged=averaged)]


def _fillers(rank: RankParameters, ranks: int) -> int:
    """Elements that only fill up: the vocabulary's, and ZeRO's."""
    return rank.padding + sum(-part % (2 * ranks) for part in (rank.sharded + rank.padding, rank.replicated))


def fullest_peak(
    of: Tensors, recompute: str, moments: Sequence[Moment], kept: Mapping[int, StageBytes], reduced: int = 0
) -> Peak:
    """What a rank holds at the fullest of these moments; `kept` and `reduced` as in `peak_at`.

    A search compares a hundred thousand moments: their sizes come first, the terms of the fullest alone after.
    """
    totals, waiting = [each.total for each in kept.values()], [each.waiting for each in kept.values()]
    beside = {
        (doing, stage): _transients(of, recompute, doing, stage, kept[stage], reduced)
        for doing, stage in {(moment.doing, moment.stage) for moment in moments}
    }

    def size(moment: Moment) -> int:
        held = sum(map(mul, moment.kept, totals)) + sum(map(mul, moment.waiting, waiting))
        return held + beside[moment.doing, moment.stage]

    return peak_at(of, recompute, max(moments, key=size), kept, reduced)


def peak_at(of: Tensors, recompute: str, moment: Moment, kept: Mapping[int, StageBytes], reduced: int = 0) -> Peak:
    """What a rank holds in the midst of a forward or backward.

    `kept` is what each of its stages keeps, by its index and in the order of the model; `reduced` is what ZeRO takes to
    send gradients in a backward.
    """
    here, in_flight = kept[moment.stage], list(zip(moment.kept, kept.values(), strict=True))
    loss = sum(count * each.loss for count, each in in_flight)
    logits = logits_bytes(of) if here.loss and moment.doing == "F" else 0
    return Peak(
        at=f"{_WORDS[moment.doing]} of stage {moment.stage}",
        activations=sum(count * each.total for count, each in in_flight) - loss,
        how=" + ".join(f"{n} * {each.total - each.loss}" for n, each in in_flight if n),
        waiting=sum(count * each.waiting for count, each in zip(moment.waiting, kept.values(), strict=True)),
        logits=logits + loss,
        transients=_transients(of, recompute, moment.doing, moment.stage, here, reduced) - logits,
    )


_WORDS = {"F": "forward", "B": "backward", "I": "inputs' part of the backward", "W": "weights' part of the backward"}


def _transients(of: Tensors, recompute: str, doing: Kind, index: int, stage: StageBytes, reduced: int) -> int:
    """The largest temporaries of a stage's forward or backward, logits included."""
    first = index == 0
    if doing == "F":
        # What the layers form beside what they keep is less than what their backward holds.
        return loss_forward_bytes(of) if stage.loss else 0
    if doing == "I" and first:
        return 0
    if doing == "W" and not first:
        return layer_weights_bytes(of, recompute)
    # The layers' backward begins when that of the loss and of the last norm has let go of what they kept.
    layer = layer_backward_bytes(of, recompute) + reduced - stage.loss - stage.norm
    return max(loss_backward_bytes(of), layer) if stage.loss else layer


def messages(every: Sequence[Stage], rank: int) -> int:
    """Hidden states and gradients that a rank holds on their way.

    Of each stage before one of its own: a hidden state that came ahead of its turn and a gradient that is leaving; of
    each stage after, a gradient that came. Where a V turns two stages of one rank hand their tensors over.
    """
    pairs = pairwise(stage.rank for stage in every)
    return sum(2 * (after == rank) + (before == rank) for before, after in pairs if before != after)


def overhead(config: RunConfig, dp_size: int, beside_state: int) -> MemoryRow:
    """What the device has beside tensors; nothing on a CPU."""
    parallel = config.parallel
    split = {"tp": parallel.tensor > 1, "pp": parallel.pipeline > 1, "cp": parallel.context > 1, "dp": dp_size > 1}
    axes = (("tp",), ("pp",), ("cp",), ("cp", "dp"), ("tp", "pp"), ("tp", "pp", "cp", "dp"))
    groups = len({frozenset(filter(split.get, axis)) for axis in axes} - {frozenset()})  # of the same ranks: one
    if config.train.device == "cpu":
        return MemoryRow("overhead", "overhead", "none on a CPU", 0)
    size = CONTEXT + groups * COMMUNICATOR + int(SLACK * beside_state)
    return MemoryRow("overhead", "overhead", f"assumed: context, {groups} communicators, {SLACK:.0%} slack", size)


def _peak_rows(peak: Peak) -> list[MemoryRow]:
    rows = [
        MemoryRow("activations", "activations in flight", peak.how, peak.activations),
        MemoryRow("waiting_gradients", "gradients between parts of a backward", "of layers' outputs", peak.waiting),
        MemoryRow("logits", "logits and the loss's gradients", "of one or two chunks", peak.logits),
        MemoryRow("transients", "transients", f"in the {peak.at}", peak.transients),
    ]
    return [row for row in rows if row.size]
