"""Runs that differ from one in a single key and train the same recipe: what is faster, what needs less. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu
from megallama.layout.check import check_batching
from megallama.layout.compiled import why_not_compiled
from megallama.layout.schedules import SCHEDULES
from megallama.plan.memory.ledger import rank_bytes
from megallama.plan.memory.state import GIB
from megallama.plan.search.space import LEAST_PART, RECOMPUTE, ZERO_STAGES
from megallama.plan.time.software import Machine
from megallama.plan.time.step_time import step_time

WORTHWHILE = 0.9
"""A change is worth naming where it leaves at most this share of the memory."""


@dataclass(frozen=True)
class Change:
    """Another value of one key, or more GPUs, or both."""

    config: RunConfig
    gpus: int
    key: str
    words: str
    """As it is typed."""
    instead_of: str
    size: int
    """Bytes that its fullest rank needs."""

    def seconds(self, on: Machine | None) -> float | None:
        """Predicted, of one step; None where no figure or only an assumed one is known, the same for every layout."""
        if on is None or on.mfu is not None:
            return None
        try:
            return step_time(self.config, self.gpus, on).total
        except UserError:  # a figure that this layout needs is not known
            return None


def single_changes(config: RunConfig, world_size: int, node: int) -> list[Change]:
    """All legal ones on as many GPUs, with tensor parallelism within a `node` of them.

    Model, data and global batch stay as the run has them. Those that need less memory come first, from what costs the
    least time on: batch, ZeRO, recomputation, layout.
    """
    train, parallel, zero = config.train, config.parallel, config.zero
    modes = (*RECOMPUTE, "offload")
    kind, batch, cp = modes.index(train.recompute), train.micro_batch_size, parallel.context
    keys: list[tuple[str, str, Any]] = []
    keys += [("train", "micro_batch_size", batch // n) for n in range(2, batch + 1) if batch % n == 0]
    keys += [("zero", "stage", n) for n in ZERO_STAGES if n > zero.stage and (n < 3 or train.compile is not True)]
    keys += [("train", "recompute", each) for each in modes[kind + 1 :]]
    if (world_size, zero.offload_optimizer) == (1, "none") and train.device != "cpu":  # GPUs share a host's memory
        keys.append(("zero", "offload_optimizer", "cpu"))
    keys += [("parallel", "tensor", 2 * parallel.tensor)] if 2 * parallel.tensor <= node else []
    keys += [("parallel", "context", 2 * cp)] if 2 * cp * LEAST_PART <= config.data.sequence_length else []
    keys += [("parallel", "pipeline", 2 * parallel.pipeline), ("parallel", "pipeline", parallel.pipeline // 2)]
    keys += [("parallel", "tensor", parallel.tensor // 2), ("parallel", "context", cp // 2)]
    keys += [("train", "micro_batch_size", 2 * batch)]
    keys += [("train", "recompute", each) for each in modes[:kind]]
    keys += [("zero", "stage", n) for n in ZERO_STAGES if n < zero.stage]
    if train.compile is False:
        keys.append(("train", "compile", "auto"))
    if parallel.pipeline > 1:
        keys += [("parallel", "schedule", name) for name in SCHEDULES if name != parallel.schedule]
    if isinstance(parallel.layers_per_stage, tuple):  # a list of other stages is another change
        keys = [key for key in keys if key[1] != "pipeline"]
    return [change for key in keys if key[2] and (change := _changed(config, world_size, *key)) is not None]


def refuse_too_large(config: RunConfig, world_size: int, gpu: Gpu) -> None:
    """UserError where a rank needs more than its device has, with the nearest change that fits."""
    limit, sizes = gpu.usable_bytes, rank_bytes(config, world_size)
    if max(sizes) <= limit:
        return
    where = f" on pipeline rank {sizes.index(max(sizes))}" if len(sizes) > 1 else ""
    changes = [*single_changes(config, world_size, int(gpu.gpus_per_node or 1)), *_more_gpus(config, world_size)]
    nearest = next((one for one in changes if one.size <= limit), None)
    fix = f"nearest that fits: {nearest.words}" if nearest else "no single change fits; try --search with more GPUs"
    raise UserError(
        f"the run needs {max(sizes) / GIB:.1f} GiB{where}, {(max(sizes) - limit) / GIB:.1f} GiB more than the "
        f"{limit / GIB:.1f} GiB that {gpu.key} leaves to it; {fix}"
    )


def nearest_change(config: RunConfig, world_size: int) -> Change | None:
    """The change that helps a run for want of memory and costs the least time; None if none helps.

    Where none leaves at most 0.9 of the memory, the one that leaves least.
    """
    now = max(rank_bytes(config, world_size))
    less = [one for one in single_changes(config, world_size, world_size) if one.size < now]
    worthwhile = [one for one in less if one.size <= WORTHWHILE * now]
    return worthwhile[0] if worthwhile else min(less, key=lambda one: one.size, default=None)


def _more_gpus(config: RunConfig, world_size: int) -> Iterator[Change]:
    """More stages on as many more GPUs, more parts of a long sequence, or more copies."""
    pp, cp = config.parallel.pipeline, config.parallel.context
    for factor in (2, 4, 8):
        gpus = factor * world_size
        for key, value in (("pipeline", factor * pp), ("context", factor * cp), ("pipeline", pp)):
            if key == "context" and value * LEAST_PART > config.data.sequence_length:
                continue
            if (change := _changed(config, gpus, "parallel", key, value, f" with --gpus {gpus}")) is not None:
                yield change


def _changed(config: RunConfig, gpus: int, section: str, key: str, value: Any, more: str = "") -> Change | None:
    """None where it is not legal, whatever the length of the run: it may be under way and nearly done."""
    part, update = getattr(config, section), {key: value}
    before = getattr(part, key)
    if key == "pipeline" and value != before and isinstance(part.layers_per_stage, tuple):  # a list of fewer stages
        update["layers_per_stage"] = "balanced"
        more = f" parallel.layers_per_stage=balanced{more}"
    changed = config.model_copy(update={section: part.model_copy(update=update)})
    try:
        check_batching(changed, gpus)
    except UserError:
        return None
    if changed.train.compile is True and why_not_compiled(changed) is not None:
        return None
    typed, now = (str(each).lower() if isinstance(each, bool) else str(each) for each in (value, before))
    words = f"{section}.{key}={typed}{more}"
    return Change(changed, gpus, f"{section}.{key}", words, now, max(rank_bytes(changed, gpus)))
