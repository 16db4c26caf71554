"""What a run costs as parts of a plan: parameters, batch, FLOPs, and memory rank by rank. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from megallama.config.schema import RunConfig
from megallama.hardware.gpus import USABLE, Gpu
from megallama.layout.batching import Batching
from megallama.layout.budget import batches_of, planned_tokens, steps_words, total_steps
from megallama.layout.check import check_config
from megallama.layout.counts import count_parameters, flops_per_token, hardware_flops_per_token, padded_vocabulary
from megallama.layout.frozen import frozen_matmul
from megallama.plan.memory.ledger import host_rows, memory_rows, rank_bytes
from megallama.plan.memory.state import GIB, MemoryRow, rank_parameters
from megallama.plan.report.table import Part, Row

_LEAST_SHOWN = 0.005 * GIB  # less would be 0.00
_SHORT = {"gradient_sums": "gradients", "master_weights": "master", "Adam_moments": "moments"}
"""By key without its type; the other keys are short."""


def plan_run(config: RunConfig, world_size: int, tokens: float | None = None) -> list[Part]:
    """The plan of a run on `world_size` ranks; `tokens` takes the place of the length that the run says.

    UserError if the run is not legal on that many ranks.
    """
    batching = check_config(config, world_size)
    return [
        _parameters(config),
        _batch(config, batching, tokens),
        _flops(config, planned_tokens(config, tokens)),
        *memory_parts(config, batching.dp_size),
    ]


def _parameters(config: RunConfig) -> Part:
    model, count = config.model, count_parameters(config.model)
    hidden, layers, size = model.hidden_size, model.num_hidden_layers, model.head_size
    heads = f"({model.num_attention_heads} + {model.kv_heads}) * {size}"
    head = "tied: the embedding again" if model.tie_word_embeddings else f"{model.vocab_size} * {hidden}"
    each = f"{count.attention_per_layer} + {count.mlp_per_layer} + {count.norms_per_layer}"
    matmul = f"{layers} * {count.matmul_per_layer} + {model.vocab_size} * {hidden}"
    mlp = f"{model.mlp_matrices} * {hidden} * {model.intermediate_size}"
    norms = f"2 * {hidden} + 2 * {size}" if model.qk_norm else f"2 * {hidden}"
    tp = config.parallel.tensor
    padded = padded_vocabulary(model.vocab_size, tp)
    rows = [
        Row("attention_per_layer", "attention, per layer", f"2 * {hidden} * {heads}", count.attention_per_layer),
        Row("mlp_per_layer", "MLP, per layer", mlp, count.mlp_per_layer),
        Row("norms_per_layer", "norms, per layer", norms, count.norms_per_layer),
        Row("per_layer", "one layer", each, count.per_layer),
        Row("layers", "all layers", f"{layers} * {count.per_layer}", layers * count.per_layer),
        Row("embedding", "embedding", f"{model.vocab_size} * {hidden}", count.embedding),
        Row("head", "output head", head, count.head),
        Row("final_norm", "final norm", f"{hidden}", count.final_norm),
        Row("total", "total", "layers + embedding + head + norm", count.total),
        Row("matmul", "of which multiply each token", matmul, count.matmul),
        Row("padded_vocabulary", "vocabulary in memory", f"{model.vocab_size} up to n * 128 * tp {tp}", padded),
    ]
    ranks = rank_parameters(config)
    for rank in ranks:
        how = f"{rank.sharded} cut over tp {tp} + {rank.replicated} norms + {rank.padding} padding"
        words = " and ".join(map(str, rank.stages))
        label = f"on one rank of stage {words}, {rank.layers} layers" if len(ranks) > 1 else "on one rank"
        rows.append(Row(f"pipeline_rank_{rank.rank}", label, how, rank.total))
    return Part("parameters", "Parameters", tuple(rows))


def _batch(config: RunConfig, batching: Batching, given: float | None) -> Part:
    parallel, train, each = config.parallel, config.train, config.tokens_per_step
    dp, parameters = batching.dp_size, count_parameters(config.model).total
    layout = f"{batching.world_size} / (tp {parallel.tensor} * pp {parallel.pipeline} * cp {parallel.context})"
    wanted = train.tokens if given is None else given
    if wanted is not None:
        tokens, total = int(wanted), "train.tokens" if given is None else "--tokens"
        steps, length = sum(n for _, n in batches_of(config, wanted)), steps_words(config, wanted)
    else:
        steps, tokens = total_steps(config), int(planned_tokens(config))
        length = "train.steps" if train.steps != "chinchilla" else "chinchilla: optimal tokens / tokens per step, up"
        total = f"{steps} * {each}" if not train.batch_ramp else f"steps of {steps_words(config, tokens)}"
    per_step = f"{train.global_batch_size} * {config.data.sequence_length}"
    micro, accumulated = "micro-batches per step and copy", batching.gradient_accumulation_steps
    how = f"{train.global_batch_size} / ({train.micro_batch_size} * {dp})"
    rows = (
        Row("world_size", "ranks", "", batching.world_size),
        Row("dp_size", "data-parallel copies", layout, dp),
        Row("gradient_accumulation_steps", micro, how, accumulated),
        Row("tokens_per_step", "tokens per step", per_step, each),
        Row("steps", "steps", length, steps),
        Row("tokens", "tokens", total, tokens),
        Row("tokens_per_parameter", "tokens per parameter", f"{tokens} / {parameters}", tokens / parameters),
    )
    return Part("batch", "Batch and length", rows)


def _flops(config: RunConfig, tokens: float) -> Part:
    model, length = config.model, config.data.sequence_length
    frozen, recompute = frozen_matmul(config), config.train.recompute
    matmul = f"6 * {count_parameters(model).matmul}{f' - 2 * {frozen} frozen' if frozen else ''}"
    attention = f"{model.num_hidden_layers} * {model.num_attention_heads * model.head_size} * {length}"
    full, causal = flops_per_token(model, length, "full", frozen), flops_per_token(model, length, "causal", frozen)
    rows = [Row("per_token_full", "per token, full convention", f"{matmul} + 12 * {attention}", full)]
    rows.append(Row("per_token_causal", "per token, causal convention", f"{matmul} + 6 * {attention}", causal))
    hardware = hardware_flops_per_token(model, length, recompute, frozen)
    if hardware != full:
        how = f"full + 2 * layers' matmul weights + 4 * {attention}"
        rows.append(Row("per_token_hardware", "per token, with recomputation", how, hardware))
    rows.append(Row("run_full", "whole run, full convention", f"{full} * {tokens:.4g} tokens", float(full * tokens)))
    rows.append(Row("run_causal", "whole run, causal convention", f"{causal} * {tokens:.4g}", float(causal * tokens)))
    halved = config.train.objective == "causal"
    return Part("flops", "FLOPs", tuple(row for row in rows if halved or not row.key.endswith("_causal")))


def memory_parts(config: RunConfig, dp_size: int) -> list[Part]:
    """Bytes that a device must have under `memory`, of each pipeline rank under `memory_pipeline_rank_0` and so on.

    The sums of all ranks are under `memory_by_pipeline_rank`, where there are several.
    """
    ranks = memory_rows(config, dp_size)
    sums = [sum(row.size for row in rows) for rows in ranks]
    fullest = sums.index(max(sums))
    place = f", pipeline rank {fullest}" if len(ranks) > 1 else ""
    title = f"Memory on one rank, ZeRO-{config.zero.stage}, {config.train.dtype}{place}"
    parts = [_memory("memory", title, ranks[fullest])]
    parts += [_memory(f"memory_pipeline_rank_{i}", "", rows, for_scripts=True) for i, rows in enumerate(ranks)]
    if len(ranks) > 1:
        each = [
            Row(f"pipeline_rank_{i}", f"pipeline rank {i}", _line(rows), size, "GiB")
            for i, (rows, size) in enumerate(zip(ranks, sums, strict=True))
        ]
        parts.append(Part("memory_by_pipeline_rank", "Memory by pipeline rank, GiB", tuple(each)))
    if host := max(host_rows(config, dp_size), key=lambda rows: sum(row.size for row in rows)):
        found = tuple(Row(row.key, row.name, row.how, row.size, "GiB") for row in host)
        parts.append(Part("host_memory", "Host memory of one rank, beside a process", found))
    return parts


def fit_part(config: RunConfig, world_size: int, gpu: Gpu) -> Part:
    """What the fullest rank needs beside what a device leaves to it; UserError where the memory is not known."""
    needed, usable = max(rank_bytes(config, world_size)), gpu.usable_bytes
    rows = (
        Row("needed", "needed", "peak of the fullest rank", needed, "GiB"),
        Row("usable", "usable", f"{USABLE:.0%} of {gpu.memory_gib:g} GiB", usable, "GiB"),
        Row("free", "left over", "usable - needed", usable - needed, "GiB"),
    )
    return Part("fit", f"{'Fits' if needed <= usable else 'Does not fit'} {gpu.name}", rows)


def _memory(key: str, title: str, rows: Sequence[MemoryRow], for_scripts: bool = False) -> Part:
    found = [Row(row.key, row.name, row.how, row.size, "GiB") for row in rows]
    found.append(Row("total", "peak", "sum", sum(row.size for row in rows), "GiB"))
    return Part(key, title, tuple(found), for_scripts=for_scripts)


def _line(rows: Sequence[MemoryRow]) -> str:
    """`weights 1.63 + gradients 3.26 + ...`."""
    shown = [
        (row.key.removeprefix("bf16_").removeprefix("fp32_"), row.size) for row in rows if row.size >= _LEAST_SHOWN
    ]
    return " + ".join(f"{_SHORT.get(key, key).replace('_', ' ')} {size / GIB:.2f}" for key, size in shown)
