"""How a run spreads its batches over a world, and batches and worlds that do not fit each other, refused. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.budget import NOTHING_SEEN, Seen
from megallama.layout.legal import divisors, either, legal_contexts, legal_tensors, nearest, nearest_multiples
from megallama.layout.schedules import legal_micro_batches


@dataclass(frozen=True)
class Batching:
    """How a legal run spreads over a world: data-parallel copies, and micro-batches of each per optimizer step."""

    world_size: int
    dp_size: int
    gradient_accumulation_steps: int
    """At train.global_batch_size, the largest batch of the run."""


def batching_of(config: RunConfig, world_size: int, seen: Seen = NOTHING_SEEN) -> Batching:
    """The batching of a run whose layout is legal; UserError where a batch is not whole micro-batches on each copy.

    Stages of train.batch_ramp that are over by `seen` need fit no more.
    """
    dp = dp_size(config, world_size)
    accumulation = gradient_accumulation_steps(config, dp)
    _check_micro_batches(config, accumulation, dp)
    _check_ramp(config, dp, seen)
    return Batching(world_size, dp, accumulation)


def dp_size(config: RunConfig, world_size: int) -> int:
    """Copies of the model: what the world size leaves over; UserError if that is not whole."""
    parallel = config.parallel
    ranks = parallel.model_ranks
    dp, rest = divmod(world_size, ranks)
    if world_size >= 1 and not rest:
        return dp
    others = ""
    for key, legal in (("tensor", legal_tensors), ("context", legal_contexts)):
        now = getattr(parallel, key)
        fitting = [n for n in legal(config) if n != now and world_size >= 1 and world_size % (ranks // now * n) == 0]
        if fitting and (now > 1 or key == "tensor"):
            others += f", or parallel.{key}={either(nearest(fitting, now))}"
    raise UserError(
        f"a world size of {world_size} is not a multiple of parallel.tensor * parallel.pipeline * parallel.context = "
        f"{parallel.tensor} * {parallel.pipeline} * {parallel.context} = {ranks}; "
        f"nearest legal: world size {either(nearest_multiples(world_size, ranks))}{others}"
    )


def gradient_accumulation_steps(config: RunConfig, dp: int) -> int:
    """Micro-batches that each data-parallel rank runs per optimizer step; UserError if that is not whole."""
    train = config.train
    samples = train.micro_batch_size * dp
    steps, rest = divmod(train.global_batch_size, samples)
    if rest:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size * dp = {train.micro_batch_size} * {dp} = {samples}; "
            f"nearest legal: {_nearest_batching(config, dp)}"
        )
    return steps


def _check_micro_batches(config: RunConfig, count: int, dp: int) -> None:
    """Refuse a number of micro-batches per step that the schedule cannot run."""
    parallel, train = config.parallel, config.train
    if legal_micro_batches(parallel, count):
        return
    raise UserError(
        f"train.global_batch_size / (train.micro_batch_size * dp) = {train.global_batch_size} / "
        f"({train.micro_batch_size} * {dp}) = {count} micro-batches, which {parallel.schedule} cannot run over "
        f"parallel.pipeline={parallel.pipeline}; nearest legal: {_nearest_batching(config, dp)}"
    )


def _check_ramp(config: RunConfig, dp: int, seen: Seen) -> None:
    """Refuse a stage of train.batch_ramp, unless it is over, whose batch cannot be cut into micro-batches."""
    train, samples = config.train, config.train.micro_batch_size * dp
    for number, stage in enumerate(train.batch_ramp):
        batch = stage.global_batch_size
        if seen.samples * config.data.sequence_length >= stage.until or _cuts(config, batch, samples):
            continue
        stages = f" that {config.parallel.schedule} can run over parallel.pipeline={config.parallel.pipeline}"
        low, high = (0, *train.batches)[number], train.batches[number + 1]
        legal = [each for each in _batches_near(config, batch, samples) if low < each < high]
        key = f"train.batch_ramp[{number}].global_batch_size"
        fix = f"{key}={either(nearest(legal, batch))}" if legal else f"train.batch_ramp without [{number}]"
        if sizes := _micro_batch_sizes(config, dp):
            fix += f", or train.micro_batch_size={either(nearest(sizes, train.micro_batch_size))}"
        raise UserError(
            f"{key}={batch} is not a number of micro-batches of train.micro_batch_size * dp = "
            f"{train.micro_batch_size} * {dp} = {samples}{stages if config.parallel.pipeline > 1 else ''}; "
            f"nearest legal: {fix}"
        )


_FAR = 4
"""Times as large as what was typed: no longer what somebody meant."""


def _nearest_batching(config: RunConfig, dp: int) -> str:
    """What makes the batch whole: first what changes no result, a micro-batch or a number of ranks."""
    train, parallel = config.train, config.parallel
    if sizes := _micro_batch_sizes(config, dp):
        return f"train.micro_batch_size={either(nearest(sizes, train.micro_batch_size))}"
    near = [count for count in divisors(train.common_batch) if count <= _FAR * dp]
    if copies := [count for count in near if _all_cut(config, count * train.micro_batch_size)]:
        ranks = parallel.model_ranks
        return f"a world size of {either(ranks * count for count in nearest(copies, dp))}"
    legal_batches = _batches_near(config, train.global_batch_size, dp * train.micro_batch_size)
    return f"train.global_batch_size={either(nearest(legal_batches, train.global_batch_size))}"


def _micro_batch_sizes(config: RunConfig, dp: int) -> list[int]:
    """Those near the one that was typed that make all batches of the run whole, in order."""
    most = _FAR * config.train.micro_batch_size
    return [size for size in divisors(config.train.common_batch) if size <= most and _all_cut(config, dp * size)]


def _all_cut(config: RunConfig, samples: int) -> bool:
    """Whether every batch of the run is made of micro-batches, of `samples` over all copies."""
    return all(_cuts(config, batch, samples) for batch in config.train.batches)


def _cuts(config: RunConfig, batch: int, samples: int) -> bool:
    """Whether `batch` is made of micro-batches, of `samples` over all copies, and of as many as the schedule runs."""
    count, rest = divmod(batch, samples)
    return not rest and legal_micro_batches(config.parallel, count)


def _batches_near(config: RunConfig, batch: int, samples: int) -> list[int]:
    """Those that `samples` cut, in order."""
    now, reach = batch // samples, 2 * config.parallel.pipeline  # what a schedule takes is no further away
    counts = range(max(1, now - reach), now + reach + 1)
    return [count * samples for count in counts if legal_micro_batches(config.parallel, count)]
