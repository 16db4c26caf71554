"""A plan that is read top to bottom, each number beside its arithmetic; or a plain dictionary of the same. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megallama.config.check import check_config
from megallama.config.schema import RunConfig
from megallama.plan.budget import total_steps
from megallama.plan.flops import flops_per_token, hardware_flops_per_token
from megallama.plan.memory import GIB, rank_state, transient_bytes
from megallama.plan.params import count_parameters, padded_vocabulary
from megallama.plan.ranks import rank_parameters
from megallama.plan.scaling import DEFAULT_FIT, FITS, LossFit

if TYPE_CHECKING:
    from rich.console import Console

Number = int | float


@dataclass(frozen=True)
class Row:
    """One figure: `key` names it in the dictionary, `label` to a reader; `how` is its arithmetic or its source."""

    key: str
    label: str
    how: str
    value: Number
    unit: str = ""


@dataclass(frozen=True)
class Part:
    """Rows under one heading."""

    key: str
    title: str
    rows: tuple[Row, ...]


def plan_run(config: RunConfig, world_size: int, tokens: float | None = None) -> list[Part]:
    """The plan of a run on `world_size` ranks; `tokens` takes the place of what train.steps comes to.

    UserError if the run is not legal on that many ranks.
    """
    batching = check_config(config, world_size)
    steps = total_steps(config)
    planned = steps * config.tokens_per_step if tokens is None else tokens
    return [
        _parameters(config),
        _batch(config, batching.world_size, batching.dp_size, batching.gradient_accumulation_steps, steps),
        _flops(config, planned),
        *_memory(config, batching.dp_size),
        _optimum_for_size(count_parameters(config.model).total),
        _loss(count_parameters(config.model).total, planned),
    ]


def plan_budget(flops: float | None, parameters: float | None, tokens: float | None) -> list[Part]:
    """The compute-optimal rest of what is given: compute, or a size, or data; a size with data is compared."""
    parts = []
    if flops is not None:
        rows = []
        for fit in FITS:
            best, data = fit.optimal_for_compute(flops)
            rows.append(Row(f"parameters {fit.name}", f"parameters, {fit.name}", fit.source, best))
            rows.append(Row(f"tokens {fit.name}", "tokens", f"{flops:.4g} / (6 * {best:.4g})", data))
        parts.append(Part("optimum_for_flops", f"Compute-optimal for {flops:.4g} FLOPs", tuple(rows)))
    if parameters is not None and tokens is not None:
        parts.append(_loss(parameters, tokens))
    if parameters is not None:
        parts.append(_optimum_for_size(parameters))
    elif tokens is not None:
        rows = [Row(fit.name, f"parameters, {fit.name}", fit.source, fit.optimal_parameters(tokens)) for fit in FITS]
        parts.append(Part("optimum_for_tokens", f"Compute-optimal size for {tokens:.4g} tokens", tuple(rows)))
    return parts


def as_dictionary(parts: Iterable[Part]) -> dict[str, dict[str, Number]]:
    """Part key -> row key -> number, at full precision."""
    return {part.key: {row.key: row.value for row in part.rows} for part in parts}


def render(parts: Iterable[Part], console: Console) -> None:
    """Print the parts as tables."""
    # Takes a tenth of a second, which --json need not wait for.
    from rich.table import Table

    for part in parts:
        table = Table(title=part.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("", overflow="fold")
        table.add_column("how", style="dim", overflow="fold")
        table.add_column("figure", justify="right", no_wrap=True)
        for row in part.rows:
            table.add_row(row.label, row.how, _written(row))
        console.print(table)
        console.print()


def _written(row: Row) -> str:
    if row.unit == "GiB":
        return f"{row.value / GIB:,.2f} GiB"
    exact = isinstance(row.value, int) and row.value < 10**13
    number = f"{row.value:,}" if exact else f"{row.value:.4g}" if row.value >= 1e6 else f"{row.value:,.4f}"
    return f"{number} {row.unit}".strip()


def _parameters(config: RunConfig) -> Part:
    model, count = config.model, count_parameters(config.model)
    hidden, layers, size = model.hidden_size, model.num_hidden_layers, model.head_size
    heads = f"({model.num_attention_heads} + {model.kv_heads}) * {size}"
    head = "tied: the embedding again" if model.tie_word_embeddings else f"{model.vocab_size} * {hidden}"
    each = f"{count.attention_per_layer} + {count.mlp_per_layer} + {count.norms_per_layer}"
    matmul = f"{layers} * {count.matmul_per_layer} + {model.vocab_size} * {hidden}"
    tp = config.parallel.tensor
    padded = padded_vocabulary(model.vocab_size, tp)
    rows = [
        Row("attention_per_layer", "attention, per layer", f"2 * {hidden} * {heads}", count.attention_per_layer),
        Row("mlp_per_layer", "SwiGLU, per layer", f"3 * {hidden} * {model.intermediate_size}", count.mlp_per_layer),
        Row("norms_per_layer", "norms, per layer", f"2 * {hidden}", count.norms_per_layer),
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


def _batch(config: RunConfig, world_size: int, dp: int, accumulation: int, steps: int) -> Part:
    parallel, train = config.parallel, config.train
    layout = f"{world_size} / (tp {parallel.tensor} * pp {parallel.pipeline} * cp {parallel.context})"
    length = "train.steps" if train.steps != "chinchilla" else "chinchilla: optimal tokens / tokens per step, up"
    tokens, parameters = steps * config.tokens_per_step, count_parameters(config.model).total
    per_step = f"{train.global_batch_size} * {config.data.sequence_length}"
    rows = (
        Row("world_size", "ranks", "", world_size),
        Row("dp_size", "data-parallel copies", layout, dp),
        Row(
            "gradient_accumulation_steps",
            "micro-batches per step and copy",
            f"{train.global_batch_size} / ({train.micro_batch_size} * {dp})",
            accumulation,
        ),
        Row("tokens_per_step", "tokens per step", per_step, config.tokens_per_step),
        Row("steps", "steps", length, steps),
        Row("tokens", "tokens", f"{steps} * {config.tokens_per_step}", tokens),
        Row("tokens_per_parameter", "tokens per parameter", f"{tokens} / {parameters}", tokens / parameters),
    )
    return Part("batch", "Batch and length", rows)


def _flops(config: RunConfig, tokens: float) -> Part:
    model, length = config.model, config.data.sequence_length
    matmul = f"6 * {count_parameters(model).matmul}"
    attention = f"{model.num_hidden_layers} * {model.num_attention_heads * model.head_size} * {length}"
    full, causal = flops_per_token(model, length, "full"), flops_per_token(model, length, "causal")
    rows = [
        Row("per_token_full", "per token, full convention", f"{matmul} + 12 * {attention}", full),
        Row("per_token_causal", "per token, causal convention", f"{matmul} + 6 * {attention}", causal),
    ]
    hardware = hardware_flops_per_token(model, length, config.train.recompute)
    if hardware != full:
        how = f"full + 2 * layers' matmul weights + 4 * {attention}"
        rows.append(Row("per_token_hardware", "per token, with recomputation", how, hardware))
    rows.append(Row("run_full", "whole run, full convention", f"{full} * {tokens:.4g} tokens", float(full * tokens)))
    rows.append(Row("run_causal", "whole run, causal convention", f"{causal} * {tokens:.4g}", float(causal * tokens)))
    return Part("flops", "FLOPs", tuple(rows))


def _memory(config: RunConfig, dp: int) -> list[Part]:
    """The fullest pipeline rank, row by row; then each one's sum where there are several."""
    ranks = rank_state(config, dp)
    sums = [sum(row.size for row in rows) for rows in ranks]
    fullest = sums.index(max(sums))
    rows = [
        Row(
            row.name.replace(" ", "_").replace(",", ""),
            row.name,
            f"{row.bytes_per_parameter} B * {row.parameters} / {row.ranks}",
            row.size,
            "GiB",
        )
        for row in ranks[fullest]
    ]
    rows.append(Row("total", "state, before activations", "sum", sums[fullest], "GiB"))
    transient = transient_bytes(config, ranks[fullest][0].parameters)
    if transient:
        how = "zero.communication_dtype=bf16 casts the whole gradient"
        rows.append(Row("transient", "more at the end of a step", how, transient, "GiB"))
    title = f"State on one rank, ZeRO-{config.zero.stage}, {config.train.dtype}"
    parts = [Part("state", f"{title}{f', pipeline rank {fullest}' if len(ranks) > 1 else ''}", tuple(rows))]
    if len(ranks) > 1:
        each = tuple(
            Row(f"pipeline_rank_{i}", f"pipeline rank {i}", "state on one rank", size, "GiB")
            for i, size in enumerate(sums)
        )
        parts.append(Part("state_by_pipeline_rank", "State by pipeline rank", each))
    return parts


def _optimum_for_size(parameters: float) -> Part:
    rows = []
    for fit in FITS:
        tokens = fit.optimal_tokens(parameters)
        rows.append(
            Row(fit.name, f"tokens, {fit.name}", f"{tokens / parameters:.2f} per parameter; {fit.source}", tokens)
        )
    return Part("optimum_for_size", f"Compute-optimal tokens for {parameters:.4g} parameters", tuple(rows))


def _loss(parameters: float, tokens: float) -> Part:
    """What this length costs against the best size at equal compute."""
    fit: LossFit = DEFAULT_FIT
    flops = 6 * parameters * tokens
    best, data = fit.optimal_for_compute(flops)
    here, there = fit.loss(parameters, tokens), fit.loss(best, data)
    what = f"{fit.irreducible} + {fit.parameter_scale} / N^{fit.parameter_exponent} + {fit.token_scale} / D^"
    rows = (
        Row("loss", "predicted loss", f"{what}{fit.token_exponent}, N = {parameters:.4g}, D = {tokens:.4g}", here),
        Row("optimal_parameters", "best size at equal compute", f"C = 6 * N * D = {flops:.4g}", best),
        Row("optimal_tokens", "its tokens", f"C / (6 * {best:.4g})", data),
        Row("optimal_loss", "its predicted loss", "same fit", there),
        Row("penalty", "penalty for this size", f"{here:.4f} - {there:.4f}", here - there),
    )
    return Part("loss", f"Predicted loss on the fit's own corpus ({fit.name}, {fit.source})", rows)
