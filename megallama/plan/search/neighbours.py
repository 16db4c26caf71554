"""Runs that differ from one in a single key and train the same recipe, with what each would take. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.check import check_config
from megallama.layout.schedules import SCHEDULES
from megallama.plan.hardware import Gpu
from megallama.plan.memory.fit import rank_bytes, usable_bytes
from megallama.plan.search.space import RECOMPUTE, ZERO_STAGES
from megallama.plan.time.software import Machine
from megallama.plan.time.step_time import step_time


@dataclass(frozen=True)
class Neighbour:
    """A legal run one change away, on as many GPUs."""

    key: str
    value: str
    instead_of: str
    size: int
    """Bytes that its fullest rank needs."""
    seconds: float | None
    """Predicted, of one step; None where the GPU has no step time."""

    @property
    def words(self) -> str:
        """As it is typed."""
        return f"{self.key}={self.value}"

    def fits(self, gpu: Gpu) -> bool:
        """Whether its fullest rank fits."""
        return self.size <= usable_bytes(gpu)


def neighbours(config: RunConfig, world_size: int, gpu: Gpu, on: Machine | None) -> list[Neighbour]:
    """All that are legal there, fitting or not; model, data and global batch stay as the run has them.

    Without a machine, as where a figure of the GPU is not known, none has a time.
    """
    found = []
    for section, key, value in _single_changes(config, int(gpu.gpus_per_node or 1)):
        part = getattr(config, section)
        changed = config.model_copy(update={section: part.model_copy(update={key: value})})
        try:
            check_config(changed, world_size)
            size = max(rank_bytes(changed, world_size))
        except UserError:
            continue
        typed, before = (
            str(each).lower() if isinstance(each, bool) else str(each) for each in (value, getattr(part, key))
        )
        seconds = _seconds(changed, world_size, on)
        found.append(Neighbour(f"{section}.{key}", typed, before, size, seconds))
    return found


def _seconds(config: RunConfig, world_size: int, on: Machine | None) -> float | None:
    if on is None or on.mfu is not None:  # an assumed MFU is the same for every layout
        return None
    try:
        return step_time(config, world_size, on).total
    except UserError:  # a figure that this layout needs is not known
        return None


def _single_changes(config: RunConfig, node: int) -> Iterator[tuple[str, str, Any]]:
    """Section, key and value."""
    train, parallel = config.train, config.parallel
    yield from (("train", "recompute", kind) for kind in RECOMPUTE if kind != train.recompute)
    if not train.compile:
        yield "train", "compile", True
    yield from (("train", "micro_batch_size", size) for size in _halves_and_doubles(train.micro_batch_size))
    tensors = _halves_and_doubles(parallel.tensor)
    yield from (("parallel", "tensor", tp) for tp in tensors if tp <= max(node, parallel.tensor))
    if not isinstance(parallel.layers_per_stage, tuple):  # a list of other stages is another change
        yield from (("parallel", "pipeline", pp) for pp in _halves_and_doubles(parallel.pipeline))
        if parallel.pipeline > 1:
            yield from (("parallel", "schedule", name) for name in SCHEDULES if name != parallel.schedule)
    yield from (("zero", "stage", stage) for stage in ZERO_STAGES if stage != config.zero.stage)


def _halves_and_doubles(value: int) -> list[int]:
    return [*([value // 2] if value % 2 == 0 else []), 2 * value]
