"""Every legal layout of a run on a number of GPUs, the fastest first; and why the others are none. Pure.

A layout is tensor- x pipeline- x data-parallel size, ZeRO stage, schedule, micro-batch size and recomputation. Model,
data and global batch stay as the run has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import isqrt
from typing import Any

from megallama.config.check import check_config, dp_size, legal_tensors
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.plan.fit import rank_bytes, usable_bytes
from megallama.plan.hardware import Gpu
from megallama.plan.memory import GIB
from megallama.plan.stages import chunks, legal_micro_batches
from megallama.plan.step_time import step_time_at
from megallama.plan.workload import workload

ZERO_STAGES = (1, 2, 3)
RECOMPUTE = ("none", "selective", "full")
"""Each keeps less for backward than the one before it."""
SCHEDULES = (
    ("1f1b", 1),
    ("interleaved1f1b", 2),
    ("interleaved1f1b", 3),
    ("interleaved1f1b", 4),
    ("dualpipev", 2),
    ("zbvzerobubble", 2),
)
"""With the stages of each rank."""
MOST_MICRO_BATCH = 64
SIMULATED = 50
"""So many of the fastest by the closed forms of equal stages are simulated, stage by stage, and ranked anew."""
NEAR = 128
"""GPU counts on either side that are tried in place of one without a legal layout."""


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
        chunks = f" x{parallel.chunks}" if parallel.schedule == "interleaved1f1b" else ""
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

    def reject(self, where: str, why: str, layouts: int = 1) -> None:
        """Add layouts to those of the same reason."""
        if not layouts:
            return
        rejection = self.rejected.setdefault(why, Rejection())
        rejection.layouts += layouts
        if where not in rejection.places:
            rejection.places.append(where)


def search(config: RunConfig, world_size: int, gpu: Gpu, software: str | None = None) -> Search:
    """Every layout of the run on `world_size` of these GPUs, at the efficiency of that generation of `software`.

    UserError if none is legal and fits, with what lacks, or where the GPUs are no whole nodes.
    """
    result, node = Search(), int(gpu.gpus_per_node or 1)
    if world_size > node and world_size % node:
        low = world_size // node * node
        raise UserError(
            f"--gpus={world_size} is no whole number of nodes of {node} {gpu.key}; nearest legal: {low} or {low + node}"
        )
    step_seconds = partial(_step_seconds, world_size=world_size, gpu=gpu, efficiency=gpu.efficiency_for(software))
    limit, too_large = usable_bytes(gpu), list[TooLarge]()
    for tp in _tensor_sizes(config, world_size, gpu, result):
        for pp in _pipeline_sizes(config, world_size // tp, tp, result):
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
        near = _enough_gpus(config, world_size, gpu) if too_large else _legal_gpus(config, world_size, gpu)
        raise UserError(f"no layout of {world_size} {gpu.key} is legal and fits; {lacking}{near}")
    return result


def _enough_gpus(config: RunConfig, world_size: int, gpu: Gpu) -> str:
    """The end of a sentence: the first doubling of the GPUs on which a layout fits; empty if six are too few."""
    limit = usable_bytes(gpu)
    for gpus in (world_size << n for n in range(1, 7)):
        if any(max(rank_bytes(one, gpus)) <= limit for one in _smallest(config, gpus, gpu)):
            return f"; try --gpus {gpus}"
    return ""


def _legal_gpus(config: RunConfig, world_size: int, gpu: Gpu) -> str:
    """The end of a sentence: the nearest GPUs below and above that have a legal layout; empty if none has."""
    node, copies = int(gpu.gpus_per_node or 1), _divisors(config.train.global_batch_size)
    tensors = [tp for tp in legal_tensors(config) if tp <= node]
    sizes = {tp * pp * dp for tp in tensors for pp in range(1, config.model.num_hidden_layers + 1) for dp in copies}
    whole = sorted(size for size in sizes if size <= node or size % node == 0)
    below, above = [size for size in whole if size < world_size], [size for size in whole if size > world_size]
    found = []
    for side in (below[: -NEAR - 1 : -1], above[:NEAR]):
        found += [size for size in side if any(_smallest(config, size, gpu))][:1]
    return f"; nearest legal: --gpus {' or '.join(map(str, found))}" if found else ""


def _smallest(config: RunConfig, world_size: int, gpu: Gpu) -> Iterator[RunConfig]:
    """The legal ones of the layouts that keep the least: all is recomputed, in micro-batches of one sequence."""
    node = int(gpu.gpus_per_node or 1)
    if world_size > node and world_size % node:
        return
    for tp in _tensor_sizes(config, world_size, gpu, Search()):
        for pp in _pipeline_sizes(config, world_size // tp, tp, Search()):
            for choice in _choices(pp, config.train.global_batch_size, world_size // (tp * pp)):
                if choice["recompute"] != "full" or choice["micro_batch_size"] > 1:
                    continue
                candidate = _with(config, tp, pp, choice)
                if _refusal(candidate, world_size) is None:
                    yield candidate


def _tensor_sizes(config: RunConfig, world_size: int, gpu: Gpu, result: Search) -> list[int]:
    """tp that divide model and world, within a node."""
    node, model = int(gpu.gpus_per_node or 1), config.model
    dividing, legal = _divisors(world_size), set(legal_tensors(config))
    far = [tp for tp in dividing if tp > node]
    cut = [tp for tp in dividing if tp <= node and tp not in legal]
    widths = f"{model.num_attention_heads} heads, {model.kv_heads * model.head_size} of keys, MLP or sequence"
    for out, why in ((far, f"crosses the node of {node} GPUs"), (cut, f"does not divide {widths}")):
        layouts = sum(_count(config, pp, world_size // tp) for tp in out for pp in _divisors(world_size // tp))
        result.reject(_several("tp", out), why, layouts)
    return [tp for tp in dividing if tp <= node and tp in legal]


def _pipeline_sizes(config: RunConfig, ranks: int, tp: int, result: Search) -> list[int]:
    """pp that divide the ranks, with a layer for each stage and a batch for each copy."""
    layers, batch = config.model.num_hidden_layers, config.train.global_batch_size
    dividing = _divisors(ranks)
    many = [pp for pp in dividing if pp > layers]
    uneven = [pp for pp in dividing if pp <= layers and batch % (ranks // pp)]
    for out, where, why in (
        (many, f"pp above {layers}", f"more stages than {layers} layers"),
        (uneven, f"tp {tp}, {_several('pp', uneven)}", f"dp does not divide train.global_batch_size={batch}"),
    ):
        result.reject(where, why, sum(_count(config, pp, ranks) for pp in out))
    return [pp for pp in dividing if pp not in many and pp not in uneven]


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
    _reject_before_trying(config, pp, world_size // tp, result)
    where, sizes, skipped = f"tp {tp} pp {pp}", list[int](), 0
    too_large: dict[tuple[Any, ...], int] = {}
    for choice in _choices(pp, config.train.global_batch_size, world_size // (tp * pp)):
        group = choice["schedule"], choice["chunks"], choice["zero"]
        if choice["micro_batch_size"] >= too_large.get(group, MOST_MICRO_BATCH + 1):
            skipped += 1  # it keeps more than one that did not fit
            continue
        candidate = _with(config, tp, pp, choice)
        refusal = _refusal(candidate, world_size)
        if refusal is not None:
            result.reject(where, refusal)
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


def _reject_before_trying(config: RunConfig, pp: int, ranks: int, result: Search) -> None:
    """What is out whatever else is chosen, and so not among `_choices`."""
    batch, dp = config.train.global_batch_size, ranks // pp
    every = _count(config, pp, ranks)
    if pp > 1 and dp > 1:
        result.reject("pp above 1", "zero.stage=2 and 3 do not go with a pipeline", every * 2 // 3)
        every //= 3
    sizes = _micro_batches(batch, dp)
    uneven = [size for size in sizes if batch % (size * dp)]
    why = f"does not divide the sequences of a copy, train.global_batch_size={batch} / dp"
    result.reject(f"dp {dp}, {_several('micro-batch', uneven)}", why, every * len(uneven) // len(sizes))


def _count(config: RunConfig, pp: int, ranks: int) -> int:
    """Layouts at this pipeline size, legal or not. With a single copy the ZeRO stages are one."""
    dp = ranks // pp
    schedules, stages = len(SCHEDULES) if pp > 1 else 1, len(ZERO_STAGES) if dp > 1 else 1
    return schedules * stages * len(RECOMPUTE) * len(_micro_batches(config.train.global_batch_size, dp))


def _micro_batches(batch: int, dp: int) -> list[int]:
    """Powers of two that are no more than a copy's sequences."""
    most = min(MOST_MICRO_BATCH, max(1, batch // dp))
    return [1 << n for n in range(most.bit_length())]


def _rank(one: Candidate) -> tuple[float, int, int]:
    """The fastest first; of two as fast, the one that computes less again, then the smaller."""
    return one.seconds, RECOMPUTE.index(one.config.train.recompute), one.size


def _step_seconds(config: RunConfig, world_size: int, gpu: Gpu, efficiency: float, *, simulated: bool = False) -> float:
    return step_time_at(workload(config, world_size, simulated=simulated), gpu, efficiency).total


def _refusal(config: RunConfig, world_size: int) -> str | None:
    """Why training would refuse the layout, in the words of a class of layouts."""
    parallel, layers = config.parallel, config.model.num_hidden_layers
    each = chunks(parallel)
    if parallel.pipeline * each > layers:
        return f"{parallel.schedule} with {each} stages on each rank has more stages than {layers} layers"
    count = config.train.global_batch_size // (dp_size(config, world_size) * config.train.micro_batch_size)
    if not legal_micro_batches(parallel, count):
        return f"{parallel.schedule} cannot run so few micro-batches over its stages"
    try:
        check_config(config, world_size)
    except UserError as error:
        return str(error)
    return None


def _choices(pp: int, batch: int, dp: int) -> Iterator[dict[str, Any]]:
    """Everything but the sizes of the mesh; what keeps less comes before what keeps more."""
    micro_batches = [size for size in _micro_batches(batch, dp) if batch % (size * dp) == 0]
    schedules = SCHEDULES if pp > 1 else (("1f1b", 1),)
    stages = ZERO_STAGES if pp == 1 and dp > 1 else (1,)
    for schedule, each in schedules:
        for zero in stages:
            for recompute in reversed(RECOMPUTE):
                for size in micro_batches:
                    yield {
                        "schedule": schedule,
                        "chunks": max(2, each),
                        "zero": zero,
                        "recompute": recompute,
                        "micro_batch_size": size,
                    }


def _with(config: RunConfig, tp: int, pp: int, choice: dict[str, Any]) -> RunConfig:
    """The run at that layout; copied field by field, since checking a whole tree again takes ten times as long."""
    parallel = config.parallel.model_copy(
        update={
            "tensor": tp,
            "pipeline": pp,
            "context": 1,
            "schedule": choice["schedule"],
            "chunks": choice["chunks"],
            "layers_per_stage": "balanced",
        }
    )
    train = config.train.model_copy(
        update={"micro_batch_size": choice["micro_batch_size"], "recompute": choice["recompute"]}
    )
    zero = config.zero.model_copy(update={"stage": choice["zero"]})
    return config.model_copy(update={"parallel": parallel, "train": train, "zero": zero})


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _several(name: str, numbers: list[int]) -> str:
    """`tp 16, 32, ... 512`."""
    if len(numbers) > 4:
        return f"{name} {numbers[0]}, {numbers[1]}, ... {numbers[-1]}"
    return f"{name} {', '.join(map(str, numbers))}"
