"""Every combination of keys that cannot run, refused before ranks meet and before anything is written. Pure.

Each refusal names the keys as they are typed, shows the arithmetic, and ends with the nearest values that would do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megallama.config.data_keys import DataConfig
from megallama.config.keys import as_typed
from megallama.config.schema import ModelConfig, RunConfig
from megallama.config.values import MOST_STAGES
from megallama.errors import UserError
from megallama.layout.budget import NOTHING_SEEN, Seen, schedule_batch, schedule_steps, total_steps
from megallama.layout.frozen import frozen_shapes
from megallama.layout.schedules import chunks, legal_micro_batches, schedule_of
from megallama.layout.stages import balanced


@dataclass(frozen=True)
class Batching:
    """How a legal run spreads over a world: data-parallel copies, and micro-batches of each per optimizer step."""

    world_size: int
    dp_size: int
    gradient_accumulation_steps: int
    """At train.global_batch_size, the largest batch of the run."""


def check_config(config: RunConfig, world_size: int, seen: Seen = NOTHING_SEEN) -> Batching:
    """The batching of a run that is legal on `world_size` ranks; UserError for the first thing that is not.

    `seen` is how far the run is: where its length is in tokens, that has a say in how many steps it takes; and the
    stages of train.batch_ramp that are over need fit no more.
    """
    batching = check_batching(config, world_size, seen)
    check_steps(config, seen)
    return batching


def check_training(config: RunConfig, world_size: int, seen: Seen = NOTHING_SEEN) -> Batching:
    """`check_config` of what is to be trained, and not planned alone."""
    check_trained(config.model)
    if config.zero.stage == 3 and config.train.compile:
        # ZeRO 3 gathers and drops weights in hooks: 12 layers became 26 graphs with 40 breaks.
        raise UserError(
            "train.compile=true gains nothing at zero.stage=3, which gathers each layer's weights between its graphs; "
            "use zero.stage=2, or train.compile=false"
        )
    return check_config(config, world_size, seen)


def check_batching(config: RunConfig, world_size: int, seen: Seen = NOTHING_SEEN) -> Batching:
    """The batching of a run whose length is legal, or does not matter; UserError where the rest of it is not."""
    check_model(config.model)
    _check_samples(config.data)
    frozen_shapes(config.model, config.train.freeze)
    check_layout(config, world_size)
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
    others = parallel.pipeline * parallel.context
    tensors = [t for t in legal_tensors(config) if world_size >= 1 and world_size % (t * others) == 0]
    or_tensor = f", or parallel.tensor={_or(_nearest(tensors, parallel.tensor))}" if tensors else ""
    raise UserError(
        f"a world size of {world_size} is not a multiple of parallel.tensor * parallel.pipeline * parallel.context = "
        f"{parallel.tensor} * {parallel.pipeline} * {parallel.context} = {ranks}; "
        f"nearest legal: world size {_or(_nearest_multiples(world_size, ranks))}{or_tensor}"
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


_FAR = 4
"""Times as large as what was typed: no longer what somebody meant."""


def _nearest_batching(config: RunConfig, dp: int) -> str:
    """What makes the batch whole: first what changes no result, a micro-batch or a number of ranks."""
    train, parallel = config.train, config.parallel
    if sizes := _micro_batch_sizes(config, dp):
        return f"train.micro_batch_size={_or(_nearest(sizes, train.micro_batch_size))}"
    near = [count for count in divisors(train.common_batch) if count <= _FAR * dp]
    if copies := [count for count in near if _all_cut(config, count * train.micro_batch_size)]:
        ranks = parallel.model_ranks
        return f"a world size of {_or(ranks * count for count in _nearest(copies, dp))}"
    legal_batches = _batches_near(config, train.global_batch_size, dp * train.micro_batch_size)
    return f"train.global_batch_size={_or(_nearest(legal_batches, train.global_batch_size))}"


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


def legal_tensors(config: RunConfig) -> list[int]:
    """Every parallel.tensor that cuts evenly: heads, KV width, MLP width, and a rank's part of the sequence if cut."""
    model = config.model
    common = math.gcd(model.num_attention_heads, model.kv_heads * model.head_size, model.intermediate_size)
    if config.parallel.sequence is not False:
        common = math.gcd(common, config.data.sequence_length // config.parallel.context)
    return divisors(common)


def check_model(model: ModelConfig) -> None:
    """Refuse shapes that are no Llama at any layout."""
    heads, rope = model.num_attention_heads, model.rope_scaling
    if rope is not None and rope.rope_type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise UserError(
            f"model.rope_scaling.high_freq_factor={rope.high_freq_factor:g} is not above low_freq_factor="
            f"{rope.low_freq_factor:g}; Llama 3.1 has high_freq_factor=4 and low_freq_factor=1"
        )
    if heads % model.kv_heads:
        raise UserError(
            f"model.num_key_value_heads={model.kv_heads} does not divide model.num_attention_heads={heads}; "
            f"nearest legal: {_or(_nearest(divisors(heads), model.kv_heads))}"
        )
    if model.head_dim is None and model.hidden_size % heads:
        raise UserError(
            f"model.num_attention_heads={heads} does not divide model.hidden_size={model.hidden_size}; nearest legal: "
            f"model.hidden_size={_or(_nearest_multiples(model.hidden_size, 2 * heads))}, or give model.head_dim"
        )
    if model.head_dim is not None and model.head_dim % 2:
        raise UserError(
            f"model.head_dim={model.head_dim} is odd, and rotary embedding turns pairs; "
            f"nearest legal: {_or(_nearest_multiples(model.head_dim, 2))}"
        )
    if model.head_size % 2:
        raise UserError(
            f"model.hidden_size / model.num_attention_heads = {model.hidden_size} / {heads} = {model.head_size} "
            f"is odd, and rotary embedding turns pairs; nearest legal: "
            f"model.hidden_size={_or(_nearest_multiples(model.hidden_size, 2 * heads))}"
        )


def _check_samples(data: DataConfig) -> None:
    """Refuse keys of a document alone where samples are cut from all in a row."""
    for key, value, usual in (("truncate", data.truncate, "first"), ("pad", data.pad, "right")):
        if data.pack == "all" and value != usual:
            raise UserError(
                f"data.{key}={value} is for data.pack=one: with data.pack=all samples are full, and cut from all "
                f"documents in a row; use data.pack=one, or data.{key}={usual}"
            )


def check_trained(model: ModelConfig) -> None:
    """UserError for a model that cannot be trained, though a plan may judge it."""
    check_model(model)
    if model.block != "llama":
        raise UserError(f"model.block={model.block} is for `megallama plan` alone; nearest legal: model.block=llama")


def check_layout(config: RunConfig, world_size: int) -> None:
    """Refuse layouts that this model cannot be cut into, and pairs of parallelism that do not go together."""
    if config.parallel.context > 1:
        _check_slices(config)
    _check_tensor(config)
    if config.parallel.context > 1 and config.parallel.context_mode == "ulysses":
        _check_heads(config)
    _check_stages(config, world_size)
    if config.parallel.pipeline > 1:
        _check_pipeline(config)
    if config.zero.stage == 0:
        raise UserError("zero.stage=0 is not offered: at dp 1 stage 1 is the same; use zero.stage=1")
    longest = config.model.max_position_embeddings
    if config.data.sequence_length > longest:
        raise UserError(
            f"data.sequence_length={config.data.sequence_length} is more than model.max_position_embeddings={longest}; "
            f"nearest legal: data.sequence_length={longest}, "
            f"or model.max_position_embeddings={config.data.sequence_length}"
        )


def _check_slices(config: RunConfig) -> None:
    """Refuse sequences that do not cut into two slices for each context-parallel rank."""
    length, cp = config.data.sequence_length, config.parallel.context
    if length % (2 * cp) == 0:
        return
    tp = config.parallel.tensor if config.parallel.sequence_parallel else 1
    lengths = _nearest_multiples(length, cp * math.lcm(2, tp))
    legal = [n for n in lengths if n <= config.model.max_position_embeddings] or lengths
    raise UserError(
        f"data.sequence_length={length} is not a multiple of 2 * parallel.context = 2 * {cp} = {2 * cp}, the slices "
        f"that context parallelism cuts; nearest legal: data.sequence_length={_or(legal)}, "
        f"or parallel.context={_or(_nearest(legal_contexts(config), cp))}"
    )


def _check_heads(config: RunConfig) -> None:
    """Refuse heads that context-parallel ranks cannot share (arXiv 2309.14509, section 3.1)."""
    cp, tp, local = config.parallel.context, config.parallel.tensor, _local_heads(config)
    key, count = next(((key, n) for key, n in local.items() if n % cp), (None, 0))
    if key is None:
        return
    words = f"{key} / parallel.tensor = {count * tp} / {tp} = {count}"
    nearest = _or(_nearest(legal_contexts(config), cp))
    raise UserError(
        f"parallel.context={cp} does not divide {words}, the heads of each rank, which parallel.context_mode=ulysses "
        f"cuts; nearest legal: parallel.context={nearest}, or parallel.context_mode=gather"
    )


def _local_heads(config: RunConfig) -> dict[str, int]:
    """Heads on each tensor-parallel rank, by key; key and value heads that tp does not divide are one a query head."""
    model, tp = config.model, config.parallel.tensor
    local = {"model.num_attention_heads": model.num_attention_heads // tp}
    return local if model.kv_heads % tp else local | {"model.num_key_value_heads": model.kv_heads // tp}


def legal_contexts(config: RunConfig) -> list[int]:
    """Every parallel.context that cuts evenly: the sequence, what tensor parallelism cuts of it, heads in ulysses."""
    parallel = config.parallel
    tp = parallel.tensor if parallel.sequence_parallel else 1
    length, unit = config.data.sequence_length, math.lcm(2, tp)
    every = divisors(length // unit) if length % unit == 0 else [1]
    heads = math.gcd(*_local_heads(config).values()) if parallel.context_mode == "ulysses" else 0
    return [n for n in every if heads % n == 0]


def _check_tensor(config: RunConfig) -> None:
    model, parallel = config.model, config.parallel
    kv_width = model.kv_heads * model.head_size
    cuts = [
        (model.num_attention_heads, f"model.num_attention_heads={model.num_attention_heads}"),
        (kv_width, f"model.num_key_value_heads * head size = {model.kv_heads} * {model.head_size} = {kv_width}"),
        (model.intermediate_size, f"model.intermediate_size={model.intermediate_size}"),
    ]
    if parallel.sequence_parallel:
        length, cp = config.data.sequence_length, parallel.context
        words = f"={length}" if cp == 1 else f" / parallel.context = {length} / {cp} = {length // cp}"
        cuts.append((length // cp, f"data.sequence_length{words}, which parallel.sequence cuts"))
    for size, words in cuts:
        if size % parallel.tensor:
            nearest = _nearest(legal_tensors(config), parallel.tensor)
            raise UserError(f"parallel.tensor={parallel.tensor} does not divide {words}; nearest legal: {_or(nearest)}")


def _check_stages(config: RunConfig, world_size: int) -> None:
    """Refuse stages without a layer, or a list that is not of these stages and layers; also without a pipeline."""
    model, parallel = config.model, config.parallel
    per_rank = chunks(parallel)
    stages = parallel.pipeline * per_rank
    words = f"parallel.pipeline * chunks of {parallel.schedule} = {parallel.pipeline} * {per_rank} = {stages}"
    if model.num_hidden_layers < stages:
        fitting = range(1, max(1, model.num_hidden_layers // per_rank) + 1)
        # Where parallel.tensor alone does not divide the world none does, and the world size is refused next anyway.
        dividing = [n for n in fitting if world_size % (parallel.tensor * parallel.context * n) == 0]
        raise UserError(
            f"model.num_hidden_layers={model.num_hidden_layers} is fewer than {words} stages; "
            f"nearest legal for a world size of {world_size}: parallel.pipeline={max(dividing or fitting)}"
        )
    if stages > MOST_STAGES:
        raise UserError(
            f"{words} stages are more than {MOST_STAGES}; nearest legal: "
            f"parallel.chunks={MOST_STAGES // parallel.pipeline}"
        )
    split = parallel.layers_per_stage
    if isinstance(split, tuple) and (len(split) != stages or sum(split) != model.num_hidden_layers):
        even = ", ".join(map(str, balanced(model.num_hidden_layers, stages, 0.0)))
        raise UserError(
            f"parallel.layers_per_stage={as_typed(list(split))} has {len(split)} stages and {sum(split)} layers; "
            f"{words} and model.num_hidden_layers={model.num_hidden_layers}, so use for example [{even}]"
        )


def _check_pipeline(config: RunConfig) -> None:
    """Refuse what does not go with a pipeline."""
    model, parallel = config.model, config.parallel
    if config.zero.stage > 1:
        raise UserError(
            f"zero.stage={config.zero.stage} does not go with parallel.pipeline={parallel.pipeline}; "
            f"use zero.stage=1, or parallel.pipeline=1"
        )
    if config.train.compile and schedule_of(parallel).splits_backward != "never":
        raise UserError(
            f"train.compile=true does not go with parallel.schedule={parallel.schedule}, which runs a backward in two "
            "parts; use train.compile=false, or parallel.schedule=interleaved1f1b"
        )
    if model.tie_word_embeddings and not schedule_of(parallel).v_shaped:
        raise UserError(
            f"model.tie_word_embeddings=true with parallel.pipeline={parallel.pipeline} under {parallel.schedule} puts "
            "one weight on two ranks; use parallel.schedule=zbvzerobubble or dualpipev, whose V ends where it began, "
            "or parallel.pipeline=1"
        )


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
        nearest = f"{key}={_or(_nearest(legal, batch))}" if legal else f"train.batch_ramp without [{number}]"
        if sizes := _micro_batch_sizes(config, dp):
            nearest += f", or train.micro_batch_size={_or(_nearest(sizes, train.micro_batch_size))}"
        raise UserError(
            f"{key}={batch} is not a number of micro-batches of train.micro_batch_size * dp = "
            f"{train.micro_batch_size} * {dp} = {samples}{stages if config.parallel.pipeline > 1 else ''}; "
            f"nearest legal: {nearest}"
        )


def check_steps(config: RunConfig, seen: Seen = NOTHING_SEEN) -> None:
    """Refuse lengths and rates that contradict each other."""
    steps, schedule = total_steps(config, seen), config.schedule
    stop_after, warmup = config.train.stop_after, schedule.warmup_steps
    if stop_after is not None and stop_after > steps:
        raise UserError(
            f"train.stop_after={stop_after} is more than {_length_words(config, steps)}; "
            f"nearest legal: train.stop_after={steps}"
        )
    steps = schedule_steps(config, seen)
    if warmup >= steps:
        longer = f"train.steps={warmup + 1}"
        if config.train.tokens is not None:
            tokens = schedule_batch(config, seen) * config.data.sequence_length * (warmup + 1)
            longer = f"train.tokens={tokens}"
        raise UserError(
            f"schedule.warmup_steps={warmup} leaves nothing of {_length_words(config, steps)}; "
            f"nearest legal: schedule.warmup_steps={steps - 1}, or {longer}"
        )
    if schedule.kind == "wsd" and schedule.decay_steps is not None and warmup + schedule.decay_steps > steps:
        legal = f"schedule.decay_steps={steps - warmup}"
        raise UserError(
            f"schedule.warmup_steps + schedule.decay_steps = {warmup} + {schedule.decay_steps} = "
            f"{warmup + schedule.decay_steps} is more than {_length_words(config, steps)}; "
            f"nearest legal: {legal}"
        )
    if schedule.min_lr > config.optimizer.lr:
        raise UserError(
            f"schedule.min_lr={schedule.min_lr:g} is more than optimizer.lr={config.optimizer.lr:g}; "
            f"nearest legal: schedule.min_lr={config.optimizer.lr:g}"
        )


def _length_words(config: RunConfig, steps: int) -> str:
    if config.train.tokens is not None:
        return f"train.tokens={config.train.tokens} = {steps} steps"
    return f"train.steps={steps}" if config.train.steps != "chinchilla" else f"train.steps=chinchilla = {steps}"


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _nearest(legal: Iterable[int], value: int) -> list[int]:
    """The closest legal values on either side of `value`, which itself is not among them."""
    below, above = [n for n in legal if n < value], [n for n in legal if n > value]
    return below[-1:] + above[:1]


def _nearest_multiples(value: int, unit: int) -> list[int]:
    """The positive multiples of `unit` on either side of `value`."""
    below = value // unit * unit
    return [below, below + unit] if below >= unit else [unit]


def _or(numbers: Iterable[int]) -> str:
    return " or ".join(str(number) for number in numbers)
