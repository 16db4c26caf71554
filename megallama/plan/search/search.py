"""Every legal layout of a run on a number of GPUs, the fastest first; and why the others are none. Pure.

A layout is tensor- x context- x pipeline- x data-parallel size, ZeRO stage, schedule, micro-batch size and
recomputation. Model, data and global batch stay as the run has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu
from megallama.layout.schedules import SCHEDULES, schedule_of
from megallama.plan.memory.ledger import rank_bytes
from megallama.plan.memory.state import GIB
from megallama.plan.search.space import (
    MOST_MICRO_BATCH,
    RECOMPUTE,
    Reject,
    choices,
    contexts,
    pipeline_sizes,
    refusal,
    tensor_sizes,
    with_layout,
)
from megallama.plan.time.software import Machine
from megallama.plan.time.step_time import step_time

SIMULATED = 50
"""The number of the fastest, by the closed forms of equal stages, that are simulated and ranked anew."""
TIE = 0.05
"""Layouts that differ by less are as fast as a prediction can tell: its mean error on published runs is 5 %."""
NEAR = 128
"""Nodes, or GPUs within one, on either side that are tried in place of a number without a layout."""


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
        dp = self.world_size // parallel.model_ranks
        cp = f"cp{parallel.context} " if parallel.context > 1 else ""
        chunks = f" x{parallel.chunks}" if schedule_of(parallel).stages_per_rank is None else ""
        schedule = f" {parallel.schedule}{chunks}" if parallel.pipeline > 1 else ""
        return (
            f"tp{parallel.tensor} {cp}pp{parallel.pipeline} dp{dp} zero{self.config.zero.stage}{schedule} "
            f"micro-batch {train.micro_batch_size} {train.recompute}"
        )

    @property
    def complexity(self) -> tuple[int, ...]:
        """What there is to understand: pipeline, tensor and context parallelism, schedule, recomputation, ZeRO."""
        parallel, train = self.config.parallel, self.config.train
        schedule = list(SCHEDULES).index(parallel.schedule) if parallel.pipeline > 1 else 0
        axes = sum(size > 1 for size in parallel.sizes.values())
        return axes, schedule, RECOMPUTE.index(train.recompute), self.config.zero.stage, parallel.pipeline


@dataclass
class Search:
    """What was found and what was not taken."""

    found: list[Candidate] = field(default_factory=list)
    """Ties with the fastest first, the simplest of them before the others; then the rest, the fastest first."""
    rejected: dict[str, Counter[str]] = field(default_factory=dict)
    """Layouts by reason, and by where they are. Each is under one reason alone."""
    ties: int = 0
    """Layouts at the head of `found` that are as fast as the fastest, as far as can be told."""

    @property
    def tried(self) -> int:
        """Layouts, found and rejected."""
        return len(self.found) + sum(places.total() for places in self.rejected.values())

    def reject(self, why: str, where: str, layouts: int) -> None:
        """Add layouts to those of the same reason."""
        if layouts:
            self.rejected.setdefault(why, Counter())[where] += layouts


def search(config: RunConfig, world_size: int, on: Machine) -> Search:
    """Every layout of the run on `world_size` of these GPUs.

    UserError if none is legal and fits, with what lacks, or where the GPUs are no whole nodes.
    """
    result, gpu, sizes = Search(), on.gpu, dict[str, int]()
    node = int(gpu.known("gpus_per_node")) if world_size > 1 else 1
    if world_size > node and world_size % node:
        low = world_size // node * node
        raise UserError(
            f"--gpus={world_size} is no whole number of nodes of {node} {gpu.key}; whole nodes: {low} or {low + node}"
        )
    for one, tp, pp in _meshes(config, world_size, gpu, result.reject):
        # Sequences are cut further only where a batch has too few of them, or something did not fit.
        cp = one.parallel.context
        few = 2 * world_size // (tp * pp * cp) > one.train.common_batch
        if cp == 1 or few or _where(tp, pp, cp // 2) in sizes:
            _search_sizes(one, tp, pp, world_size, on, result, sizes)
    if not result.found:
        raise UserError(
            f"no layout of {world_size} {gpu.key} is legal and fits; {_lacking(result, sizes, gpu)}"
            f"{other_gpus(config, world_size, gpu, more=bool(sizes))}"
        )
    result.found.sort(key=_rank)
    best = SIMULATED if on.mfu is None else len(result.found)
    simulated = [replace(one, seconds=step_time(one.config, world_size, on).total) for one in result.found[:best]]
    # What was not simulated is behind: its closed form is too kind to it.
    result.found[:best] = sorted(simulated, key=_rank)
    slowest = (1 + TIE) * result.found[0].seconds
    result.ties = sum(one.seconds <= slowest for one in simulated)
    tied = sorted(result.found[: result.ties], key=lambda one: (one.complexity, one.seconds))
    result.found[: result.ties] = tied
    return result


def _search_sizes(
    config: RunConfig, tp: int, pp: int, world_size: int, on: Machine, result: Search, sizes: dict[str, int]
) -> None:
    """Add what fits at these sizes, and what does not to the rejected; of the latter the least bytes to `sizes`."""
    cp, limit = config.parallel.context, on.gpu.usable_bytes
    where = _where(tp, pp, cp)
    too_large: dict[tuple[Any, ...], int] = {}
    why = f"more than {limit / GIB:.1f} GiB"
    for choice in choices(config, pp, world_size // (tp * pp * cp)):
        group = choice["schedule"], choice["chunks"], choice["zero"]
        if choice["micro_batch_size"] >= too_large.get(group, MOST_MICRO_BATCH + 1):
            result.reject(why, where, 1)  # it keeps more than one that did not fit
            continue
        candidate = with_layout(config, tp, pp, choice)
        if (refused := refusal(candidate, world_size)) is not None:
            result.reject(refused, where, 1)
            continue
        size = max(rank_bytes(candidate, world_size))
        if size > limit:
            too_large[group] = choice["micro_batch_size"]
            sizes[where] = min(size, sizes.get(where, size))
            result.reject(why, where, 1)
            continue
        seconds = step_time(candidate, world_size, on, simulated=False).total
        result.found.append(Candidate(candidate, world_size, seconds, size))


def _where(tp: int, pp: int, cp: int) -> str:
    return f"tp {tp} pp {pp}" + (f" cp {cp}" if cp > 1 else "")


def _rank(one: Candidate) -> tuple[float, int, int]:
    """The fastest first; of two as fast, the one that computes less again, then the smaller."""
    return one.seconds, RECOMPUTE.index(one.config.train.recompute), one.size


def _lacking(result: Search, sizes: dict[str, int], gpu: Gpu) -> str:
    """The nearest to a layout: the smallest that does not fit, or the most frequent reason."""
    if sizes:
        where, limit = min(sizes, key=sizes.__getitem__), gpu.usable_bytes
        over = f"{(sizes[where] - limit) / GIB:.1f} GiB more than {limit / GIB:.1f} GiB"
        return f"the smallest, at {where}, needs {over}"
    why, places = max(result.rejected.items(), key=lambda one: len(one[1]))
    return f"{next(iter(places))}: {why}"


def other_gpus(config: RunConfig, world_size: int, gpu: Gpu, *, more: bool) -> str:
    """The end of a sentence: the first doubling on which a layout fits, or the nearest number that has a legal one.

    Empty where that is far.
    """
    node = int(gpu.gpus_per_node or 1)
    step = node if world_size > node else 1
    near = (world_size + sign * step * far for far in range(1, NEAR) for sign in (-1, 1))
    for gpus in [world_size << n for n in range(1, 7)] if more else near:
        smallest = _smallest(config, gpus, gpu) if gpus > 0 else iter(())
        if any(max(rank_bytes(one, gpus)) <= gpu.usable_bytes or not more for one in smallest):
            return f"; try --gpus {gpus}"
    return ""


def _smallest(config: RunConfig, world_size: int, gpu: Gpu) -> Iterator[RunConfig]:
    """The legal ones of the layouts that keep the least: all is recomputed, in micro-batches of one sequence."""
    node = int(gpu.gpus_per_node or 1)
    if world_size > node and world_size % node:
        return
    for one, tp, pp in _meshes(config, world_size, gpu, Search().reject):
        for choice in choices(one, pp, world_size // (tp * pp * one.parallel.context)):
            if choice["recompute"] != "full" or choice["micro_batch_size"] > 1:
                continue
            candidate = with_layout(one, tp, pp, choice)
            if refusal(candidate, world_size) is None:
                yield candidate


def _meshes(config: RunConfig, world_size: int, gpu: Gpu, reject: Reject) -> Iterator[tuple[RunConfig, int, int]]:
    """The run at every cp, with every tp and pp there; what is out is rejected where sequences are not cut."""
    for one in contexts(config, world_size):
        ranks = world_size // one.parallel.context
        out = reject if one.parallel.context == 1 else Search().reject
        for tp in tensor_sizes(one, ranks, gpu, out):
            for pp in pipeline_sizes(one, ranks // tp, tp, out):
                yield one, tp, pp
