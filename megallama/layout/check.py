"""Every combination of keys that cannot run, refused before ranks meet and before anything is written. Pure.

Each refusal names the keys as they are typed, shows the arithmetic, and ends with the nearest values that would do.
"""

from __future__ import annotations

import math

from megallama.config.data_keys import DataConfig
from megallama.config.keys import as_typed
from megallama.config.schema import ModelConfig, RunConfig
from megallama.config.train_keys import AverageConfig
from megallama.config.values import MOST_STAGES
from megallama.errors import UserError
from megallama.layout.batching import Batching, batching_of
from megallama.layout.budget import NOTHING_SEEN, Seen, schedule_batch, schedule_steps, total_steps
from megallama.layout.compiled import mlp_in_tiles, why_not_compiled
from megallama.layout.frozen import frozen_shapes
from megallama.layout.legal import (
    divisors,
    either,
    legal_contexts,
    legal_tensors,
    local_heads,
    nearest,
    nearest_multiples,
)
from megallama.layout.schedules import chunks, schedule_of
from megallama.layout.stages import balanced

FP8_MULTIPLE = 16
"""cuBLAS takes the sides of matrices of fp8 in multiples of 16 bytes."""


def check_config(config: RunConfig, world_size: int, seen: Seen = NOTHING_SEEN) -> Batching:
    """The batching of a run that is legal on `world_size` ranks; UserError for the first thing that is not.

    `seen` is how far the run is: where its length is in tokens, that has a say in how many steps it takes; and the
    stages of train.batch_ramp that are over need fit no more.
    """
    batching = check_batching(config, world_size, seen)
    check_steps(config, seen)
    _check_average(config)
    return batching


def check_training(config: RunConfig, world_size: int, seen: Seen = NOTHING_SEEN) -> Batching:
    """`check_config` of what is to be trained, and not planned alone."""
    check_trained(config.model)
    if config.train.compile is True and (reason := why_not_compiled(config)) is not None:
        raise UserError(reason)
    _check_profile(config, world_size)
    return check_config(config, world_size, seen)


def check_batching(config: RunConfig, world_size: int, seen: Seen = NOTHING_SEEN) -> Batching:
    """The batching of a run whose length is legal, or does not matter; UserError where the rest of it is not."""
    check_model(config.model)
    _check_samples(config.data)
    frozen_shapes(config.model, config.train.freeze)
    check_layout(config, world_size)
    return batching_of(config, world_size, seen)


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
            f"nearest legal: {either(nearest(divisors(heads), model.kv_heads))}"
        )
    if model.head_dim is None and model.hidden_size % heads:
        raise UserError(
            f"model.num_attention_heads={heads} does not divide model.hidden_size={model.hidden_size}; nearest legal: "
            f"model.hidden_size={either(nearest_multiples(model.hidden_size, 2 * heads))}, or give model.head_dim"
        )
    if model.head_dim is not None and model.head_dim % 2:
        raise UserError(
            f"model.head_dim={model.head_dim} is odd, and rotary embedding turns pairs; "
            f"nearest legal: {either(nearest_multiples(model.head_dim, 2))}"
        )
    if model.head_size % 2:
        raise UserError(
            f"model.hidden_size / model.num_attention_heads = {model.hidden_size} / {heads} = {model.head_size} "
            f"is odd, and rotary embedding turns pairs; nearest legal: "
            f"model.hidden_size={either(nearest_multiples(model.hidden_size, 2 * heads))}"
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


def _check_profile(config: RunConfig, world_size: int) -> None:
    """Refuse ranks to trace that are not there."""
    for number, rank in enumerate(config.train.profile.ranks):
        if rank >= world_size:
            key = f"train.profile.ranks[{number}]"
            raise UserError(
                f"{key}={rank} is no rank of a world size of {world_size}; nearest legal: {key}={world_size - 1}"
            )


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
    if config.zero.offload_optimizer == "cpu" and config.zero.stage > 1:
        raise UserError(
            f"zero.offload_optimizer=cpu does not go with zero.stage={config.zero.stage}; use zero.stage=1, or "
            "zero.offload_optimizer=none"
        )
    if config.train.matmul != "dtype":
        _check_fp8(config)
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
    lengths = nearest_multiples(length, cp * math.lcm(2, tp))
    legal = [n for n in lengths if n <= config.model.max_position_embeddings] or lengths
    raise UserError(
        f"data.sequence_length={length} is not a multiple of 2 * parallel.context = 2 * {cp} = {2 * cp}, the slices "
        f"that context parallelism cuts; nearest legal: data.sequence_length={either(legal)}, "
        f"or parallel.context={either(nearest(legal_contexts(config), cp))}"
    )


def _check_fp8(config: RunConfig) -> None:
    """Refuse matrices that the kernels of fp8 do not take, and what multiplies by itself."""
    model, parallel, matmul = config.model, config.parallel, config.train.matmul
    tp = parallel.tensor
    if config.train.dtype == "fp32":
        raise UserError(
            f"train.matmul={matmul} does not go with train.dtype=fp32, whose products are in fp32; use "
            "train.dtype=bf16, or train.matmul=dtype"
        )
    tokens = config.train.micro_batch_size * config.data.sequence_length // parallel.context
    for size, words in (
        (model.hidden_size, "model.hidden_size"),
        (model.num_attention_heads * model.head_size // tp, "model.num_attention_heads * head size / parallel.tensor"),
        (model.kv_heads * model.head_size // tp, "model.num_key_value_heads * head size / parallel.tensor"),
        (model.intermediate_size // tp, "model.intermediate_size / parallel.tensor"),
        (tokens, "train.micro_batch_size * data.sequence_length / parallel.context"),
    ):
        if size % FP8_MULTIPLE:
            raise UserError(
                f"train.matmul={matmul} multiplies matrices whose sides are multiples of {FP8_MULTIPLE}, and {words} = "
                f"{size}; nearest legal: {either(nearest_multiples(size, FP8_MULTIPLE))}, or train.matmul=dtype"
            )
    if mlp_in_tiles(config):
        raise UserError(
            f"train.matmul={matmul} does not go with train.recompute={config.train.recompute} for so many tokens, of "
            "which the MLP is computed in tiles; use a smaller train.micro_batch_size, or train.matmul=dtype"
        )


def _check_heads(config: RunConfig) -> None:
    """Refuse heads that context-parallel ranks cannot share (arXiv 2309.14509, section 3.1)."""
    cp, tp, local = config.parallel.context, config.parallel.tensor, local_heads(config)
    key, count = next(((key, n) for key, n in local.items() if n % cp), (None, 0))
    if key is None:
        return
    words = f"{key} / parallel.tensor = {count * tp} / {tp} = {count}"
    fix = either(nearest(legal_contexts(config), cp))
    raise UserError(
        f"parallel.context={cp} does not divide {words}, the heads of each rank, which parallel.context_mode=ulysses "
        f"cuts; nearest legal: parallel.context={fix}, or parallel.context_mode=gather"
    )


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
            fix = either(nearest(legal_tensors(config), parallel.tensor))
            raise UserError(f"parallel.tensor={parallel.tensor} does not divide {words}; nearest legal: {fix}")


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
    if config.train.compile is True and (reason := why_not_compiled(config)) is not None:
        raise UserError(reason)
    if model.tie_word_embeddings and not schedule_of(parallel).v_shaped:
        raise UserError(
            f"model.tie_word_embeddings=true with parallel.pipeline={parallel.pipeline} under {parallel.schedule} puts "
            "one weight on two ranks; use parallel.schedule=zbvzerobubble or dualpipev, whose V ends where it began, "
            "or parallel.pipeline=1"
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


def _check_average(config: RunConfig) -> None:
    """Refuse a mean of more checkpoints than are kept, or of none, and keys that the kind of average does not have."""
    average, keep, unset = config.train.average, config.checkpoint.keep, AverageConfig()
    for key, kind in (("decay", "exponential"), ("checkpoints", "latest")):
        value = getattr(average, key)
        if average.kind != kind and value != getattr(unset, key):
            raise UserError(
                f"train.average.{key}={value} is for train.average.kind={kind}, and that is {average.kind}; nearest "
                f"legal: train.average.kind={kind}, or leave train.average.{key} out"
            )
    if average.kind == "latest" and config.checkpoint.every == 0:
        raise UserError(
            "train.average.kind=latest is a mean of checkpoints, and checkpoint.every=0 saves the last one alone; "
            "nearest legal: checkpoint.every=1"
        )
    if average.kind == "latest" and keep < average.checkpoints:
        fewer = f", or train.average.checkpoints={keep}" if keep > 1 else ""
        raise UserError(
            f"checkpoint.keep={keep} is less than train.average.checkpoints={average.checkpoints}, which "
            f"train.average.kind=latest takes the mean of; nearest legal: "
            f"checkpoint.keep={average.checkpoints}{fewer}"
        )


def _length_words(config: RunConfig, steps: int) -> str:
    if config.train.tokens is not None:
        return f"train.tokens={config.train.tokens} = {steps} steps"
    return f"train.steps={steps}" if config.train.steps != "chinchilla" else f"train.steps=chinchilla = {steps}"
