"""Every legal layout of a run on a number of GPUs, the fastest first; and why the others are none. Pure.

A layout is tensor- x pipeline- x data-parallel size, ZeRO stage, schedule, micro-batch size and recomputation. Model,
data and global batch stay as the run has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.schedules import schedule_of
from megallama.plan.memory.fit import rank_bytes, usable_bytes
from megallama.plan.memory.lines import GIB
from megallama.plan.search.remedies import enough_gpus, legal_gpus
from megallama.plan.search.space import (
    MOST_MICRO_BATCH,
    RECOMPUTE,
    choices,
    pipeline_sizes,
    refusal,
    reject_before_trying,
    tensor_sizes,
    with_layout,
)
from megallama.plan.time.software import Machine
from megallama.plan.time.step_time import step_time

SIMULATED = 50
"""The number of the fastest, by the closed forms of equal stages, that are simulated and ranked anew."""


@dataclass(frozen=True)
class Candidate:
    """A layout that is legal and fits."""

    config: RunConfig
    world_size: int
    seconds: float
    """Predicted, of one optimizer step."""
    size: int
    """Bytes that its fullest rank needs."""

    @property
    def name(self) -> str:
        """As `tp8 pp4 dp16 zero1 interleaved1f1b x2 micro-batch 2 selective`."""
        parallel, train = self.config.parallel, self.config.train
        dp = self.world_size // (parallel.tensor * parallel.pipeline * parallel.context)
        chunks = f" x{parallel.chunks}" if schedule_of(parallel).stages_per_rank is None else ""
        schedule = f" {parallel.schedule}{chunks}" if parallel.pipeline > 1 else ""
        return (
            f"tp{parallel.tensor} pp{parallel.pipeline} dp{dp} zero{self.config.zero.stage}{schedule} "
            f"micro-batch {train.micro_batch_size} {train.recompute}"
        )


@dataclass
class Rejection:
    """Layouts that are out for one reason."""

    places: list[str] = field(default_factory=list)
    """Where they are, as `tp 16, 32` or `tp 1 pp 8`."""
    layouts: int = 0


@dataclass
class TooLarge:
    """Legal layouts at one place of tp and pp that do not fit."""

    where: str
    least: int
    """Bytes that the smallest of them needs."""
    most: int
    skipped: int = 0
    """Layouts whose bytes were not computed, since they keep more than one that did not fit."""

    def words(self, limit: int) -> str:
        """By how much they do not fit in `limit` bytes."""
        over = f"{(self.least - limit) / GIB:.1f} to {(self.most - limit) / GIB:.1f}"
        rest = f"; {self.skipped} keep more than one that did not fit" if self.skipped else ""
        return f"more than {limit / GIB:.1f} GiB, by {over}{rest}"


@dataclass
class Search:
    """What was found and what was not taken."""

    found: list[Candidate] = field(default_factory=list)
    """The fastest first."""
    rejected: dict[str, Rejection] = field(default_factory=dict)
    """By reason. Each layout is under one of them alone."""

    @property
    def tried(self) -> int:
        """Layouts, found and rejected."""
        return len(self.found) + sum(rejection.layouts for rejection in self.rejected.values())

    def reject(self, where: str, why: str, layouts: int) -> None:
        """Add layouts to those of the same reason."""
        if not layouts:
            return
        rejection = self.rejected.setdefault(why, Rejection())
        rejection.layouts += layouts
        if where not in rejection.places:
            rejection.places.append(where)


def search(config: RunConfig, world_size: int, on: Machine) -> Search:
    """Every layout of the run on `world_size` of these GPUs.

    UserError if none is legal and fits, with what lacks, or where the GPUs are no whole nodes.
    """
    gpu = on.gpu
    result, node = Search(), int(gpu.gpus_per_node or 1)
    if world_size > node and world_size % node:
        low = world_size // node * node
        raise UserError(
            f"--gpus={world_size} is no whole number of nodes of {node} {gpu.key}; nearest legal: {low} or {low + node}"
        )
    step_seconds = partial(_step_seconds, world_size=world_size, on=on)
    limit, too_large = usable_bytes(gpu), list[TooLarge]()
    for tp in tensor_sizes(config, world_size, gpu, result.reject):
        for pp in pipeline_sizes(config, world_size // tp, tp, result.reject):
            too_large += _search_sizes(config, tp, pp, world_size, limit, result, step_seconds)
    result.found.sort(key=_rank)
    for place, one in enumerate(result.found[:SIMULATED]):
        result.found[place] = replace(one, seconds=step_seconds(one.config, simulated=True))
    result.found.sort(key=_rank)
    if not result.found:
        if too_large:
            nearest = min(too_large, key=lambda one: one.least)
            over = f"{(nearest.least - limit) / GIB:.1f} GiB more than {limit / GIB:.1f} GiB"
            lacking = f"the smallest, at {nearest.where}, needs {over}"
        else:
            why, rejection = max(result.rejected.items(), key=lambda one: len(one[1].places))
            lacking = f"{rejection.places[0]}: {why}"
        near = enough_gpus(config, world_size, gpu) if too_large else legal_gpus(config, world_size, gpu)
        raise UserError(f"no layout of {world_size} {gpu.key} is legal and fits; {lacking}{near}")
    return result


def _search_sizes(
    config: RunConfig,
    tp: int,
    pp: int,
    world_size: int,
    limit: int,
    result: Search,
    step_seconds: Callable[..., float],
) -> list[TooLarge]:
    """Add what fits at these sizes, and what does not to the rejected; of the latter the bytes, if there are any."""
    reject_before_trying(config, pp, world_size // tp, result.reject)
    where, sizes, skipped = f"tp {tp} pp {pp}", list[int](), 0
    too_large: dict[tuple[Any, ...], int] = {}
    for choice in choices(pp, config.train.global_batch_size, world_size // (tp * pp)):
        group = choice["schedule"], choice["chunks"], choice["zero"]
        if choice["micro_batch_size"] >= too_large.get(group, MOST_MICRO_BATCH + 1):
            skipped += 1  # it keeps more than one that did not fit
            continue
        candidate = with_layout(config, tp, pp, choice)
        refused = refusal(candidate, world_size)
        if refused is not None:
            result.reject(where, refused, 1)
            continue
        size = max(rank_bytes(candidate, world_size))
        if size > limit:
            too_large[group] = choice["micro_batch_size"]
            sizes.append(size)
            continue
        result.found.append(Candidate(candidate, world_size, step_seconds(candidate), size))
    if not sizes:
        return []
    found = TooLarge(where, min(sizes), max(sizes), skipped)
    result.reject(where, found.words(limit), len(sizes) + skipped)
    return [found]


def _rank(one: Candidate) -> tuple[float, int, int]:
    """The fastest first; of two as fast, the one that computes less again, then the smaller."""
    return one.seconds, RECOMPUTE.index(one.config.train.recompute), one.size


def _step_seconds(config: RunConfig, world_size: int, on: Machine, *, simulated: bool = False) -> float:
    return step_time(config, world_size, on, simulated=simulated).total
