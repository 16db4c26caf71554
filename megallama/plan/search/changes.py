"""Runs that differ from one in a single key and train the same recipe: what is faster, what needs less. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.check import check_batching, check_config
from megallama.layout.schedules import SCHEDULES
from megallama.plan.hardware import Gpu
from megallama.plan.memory.ledger import rank_bytes
from megallama.plan.memory.state import GIB, MemoryRow
from megallama.plan.search.space import RECOMPUTE, ZERO_STAGES
from megallama.plan.time.software import Machine
from megallama.plan.time.step_time import step_time

WORTHWHILE = 0.9
"""A change is worth naming where it leaves at most this share of the memory."""


@dataclass(frozen=True)
class Change:
    """Another value of one key, on as many GPUs or more."""

    config: RunConfig
    key: str
    value: str
    instead_of: str
    gpus: int
    more: str = ""
    """What has to be typed beside it."""

    @property
    def words(self) -> str:
        """As it is typed."""
        return f"{self.key}={self.value}{self.more}" if self.key else self.more.strip()

    @property
    def size(self) -> int:
        """Bytes that its fullest rank needs."""
        return max(rank_bytes(self.config, self.gpus))

    def seconds(self, on: Machine | None) -> float | None:
        """Predicted, of one step; None where no figure or only an assumed one is known, the same for every layout."""
        if on is None or on.mfu is not None:
            return None
        try:
            return step_time(self.config, self.gpus, on).total
        except UserError:  # a figure that this layout needs is not known
            return None


def single_changes(config: RunConfig, world_size: int, gpu: Gpu) -> list[Change]:
    """All legal ones on as many GPUs, up and down; model, data and global batch stay as the run has them."""
    train, parallel, node = config.train, config.parallel, int(gpu.gpus_per_node or 1)
    keys: list[tuple[str, str, Any]] = [("train", "recompute", kind) for kind in RECOMPUTE if kind != train.recompute]
    keys += [] if train.compile else [("train", "compile", True)]
    keys += [("train", "micro_batch_size", size) for size in _halves_and_doubles(train.micro_batch_size)]
    tensors = _halves_and_doubles(parallel.tensor)
    keys += [("parallel", "tensor", tp) for tp in tensors if tp <= max(node, parallel.tensor)]
    if not isinstance(parallel.layers_per_stage, tuple):  # a list of other stages is another change
        keys += [("parallel", "pipeline", pp) for pp in _halves_and_doubles(parallel.pipeline)]
        if parallel.pipeline > 1:
            keys += [("parallel", "schedule", name) for name in SCHEDULES if name != parallel.schedule]
    keys += [("zero", "stage", stage) for stage in ZERO_STAGES if stage != config.zero.stage]
    return [found for key in keys if _legal(found := _changed(config, world_size, *key))]


def refuse_too_large(config: RunConfig, world_size: int, gpu: Gpu) -> None:
    """UserError where a rank needs more than its device has, with the nearest change that fits."""
    limit, sizes = gpu.usable_bytes, rank_bytes(config, world_size)
    if max(sizes) <= limit:
        return
    where = f" on pipeline rank {sizes.index(max(sizes))}" if len(sizes) > 1 else ""
    fitting = (one for one in _smaller(config, world_size, int(gpu.gpus_per_node or 1)) if _legal(one))
    nearest = next((one for one in fitting if one.size <= limit), None)
    fix = f"nearest that fits: {nearest.words}" if nearest else "no single change fits; try --search with more GPUs"
    raise UserError(
        f"the run needs {max(sizes) / GIB:.1f} GiB{where}, {(max(sizes) - limit) / GIB:.1f} GiB more than the "
        f"{limit / GIB:.1f} GiB that {gpu.key} leaves to it; {fix}"
    )


def nearest_change(config: RunConfig, world_size: int) -> Change | None:
    """The first change, from what costs least to what costs most, that helps on as many ranks; None if none does.

    Where none leaves at most 0.9 of the memory, the one that leaves least.
    """
    now = max(rank_bytes(config, world_size))
    every = (one for one in _smaller(config, world_size) if one.gpus == world_size)
    less = [one for one in every if _divides(one) and one.size < now]
    worthwhile = [one for one in less if one.size <= WORTHWHILE * now]
    return worthwhile[0] if worthwhile else min(less, key=lambda one: one.size, default=None)


def largest_terms(rows: list[MemoryRow], count: int = 3) -> list[MemoryRow]:
    """The rows that take most, the largest first."""
    return sorted(rows, key=lambda row: row.size, reverse=True)[:count]


def _smaller(config: RunConfig, world_size: int, node: int | None = None) -> Iterator[Change]:
    """What needs less, from what costs the least time on: batch, ZeRO, recomputation, layout, more GPUs.

    Tensor parallelism stays within `node` GPUs, where that is known.
    """
    parallel, micro_batch = config.parallel, config.train.micro_batch_size
    for size in range(micro_batch - 1, 0, -1):
        if micro_batch % size == 0:
            yield _changed(config, world_size, "train", "micro_batch_size", size)
    for stage in range(config.zero.stage + 1, 4):
        yield _changed(config, world_size, "zero", "stage", stage)
    for recompute in RECOMPUTE[1:]:
        yield _changed(config, world_size, "train", "recompute", recompute)
    for factor in (2, 4, 8):
        more = factor * world_size
        for key, value in (("tensor", factor * parallel.tensor), ("pipeline", factor * parallel.pipeline)):
            if key == "tensor" and node is not None and parallel.tensor < value > node:
                continue
            yield _changed(config, world_size, "parallel", key, value)
            yield _changed(config, more, "parallel", key, value, f" with --gpus {more}")
    for factor in (2, 4, 8, 16):
        yield Change(config, "", "", "", factor * world_size, f" --gpus {factor * world_size}")


def _changed(config: RunConfig, gpus: int, section: str, key: str, value: Any, more: str = "") -> Change:
    part, update = getattr(config, section), {key: value}
    if key == "pipeline" and isinstance(part.layers_per_stage, tuple):  # a list of fewer stages
        update["layers_per_stage"] = "balanced"
        more = f" parallel.layers_per_stage=balanced{more}"
    typed, before = (str(each).lower() if isinstance(each, bool) else str(each) for each in (value, getattr(part, key)))
    changed = config.model_copy(update={section: part.model_copy(update=update)})
    return Change(changed, f"{section}.{key}", typed, before, gpus, more)


def _legal(change: Change) -> bool:
    try:
        check_config(change.config, change.gpus)
    except UserError:
        return False
    return True


def _divides(change: Change) -> bool:
    """Whether the layout is legal, whatever the length is: a run that is under way may be nearly done."""
    try:
        check_batching(change.config, change.gpus)
    except UserError:
        return False
    return True


def _halves_and_doubles(value: int) -> list[int]:
    return [*([value // 2] if value % 2 == 0 else []), 2 * value]
