"""The sizing of a run as parts of a plan, read top to bottom. Pure."""

from __future__ import annotations

from megallama.errors import UserError
from megallama.layout.counts import count_parameters
from megallama.layout.scaling_laws import (
    DEFAULT_FIT,
    FLOPS_PER_PARAMETER_AND_TOKEN,
    HOFFMANN_3,
    HOFFMANN_3_UNROUNDED,
    LLAMA_3,
    LLAMA_3_ROUNDED,
    LossFit,
    PowerLaw,
)
from megallama.plan.report.table import Part, Row
from megallama.plan.sizing.batch import Range, batch_tokens, learning_rates
from megallama.plan.sizing.flags import SECONDS_PER_DAY, Compute, Question
from megallama.plan.sizing.shape import LlamaShape, find_shape
from megallama.plan.sizing.sizing import (
    MOST_EPOCHS,
    SMALLER,
    Interval,
    Optimum,
    Sizing,
    compare,
    over_trained,
    repeats_too_often,
    size,
)

_KEYS = {"flops": "optimum_for_flops", "parameters": "optimum_for_size", "tokens": "optimum_for_tokens"}
_WORDS = {"flops": "FLOPs", "parameters": "parameters", "tokens": "tokens"}


def plan_sizing(question: Question) -> list[Part]:
    """The compute-optimal rest of what is given, a shape, a batch and a learning rate; a size with data is compared."""
    parameters, tokens = question.parameters, question.tokens
    if parameters is not None and tokens is not None:
        parts = [*compared(parameters, tokens), _rounding_trap(FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens)]
    else:
        sizing = _size(question)
        parameters, tokens = sizing.best.parameters, sizing.best.tokens
        parts = [*([_compute(question.compute)] if question.compute else []), *optimum(sizing)]
    if question.unique_tokens is not None:
        parts.append(repetition(tokens, question.unique_tokens))
    return [*parts, *_recipe(parameters, tokens, question.vocab_size)]


def optimum(sizing: Sizing) -> list[Part]:
    """What every fit holds best, how far rounding moves it, and the price of smaller models."""
    return [_optimum(sizing), _rounding_trap(sizing.best.flops), _over_training(sizing)]


def compared(parameters: float, tokens: float) -> list[Part]:
    """The loss of a size on its tokens beside the best of equal compute, and the tokens that would be best for it."""
    return [_loss(parameters, tokens), _optimum(size("parameters", parameters))]


def repetition(tokens: float, unique_tokens: float) -> Part:
    """How often training goes over its data, with a warning above four times."""
    most, needed = MOST_EPOCHS * unique_tokens, tokens / MOST_EPOCHS
    rows = (
        Row("epochs", "epochs", f"{tokens:.4g} / {unique_tokens:.4g}", tokens / unique_tokens),
        Row("most_epochs", "repeated tokens are nearly worth fresh ones up to", "arXiv 2305.16264", MOST_EPOCHS),
        Row("most_tokens", "tokens of training at most", f"{MOST_EPOCHS} * {unique_tokens:.4g}", most),
        Row("needed_unique_tokens", "or unique tokens at least", f"{tokens:.4g} / {MOST_EPOCHS}", needed),
    )
    warning = (
        f"Warning: the data repeats {tokens / unique_tokens:.1f} times. Above {MOST_EPOCHS} times repeated tokens are "
        f"worth less than fresh ones: find {needed:.4g} unique tokens, or train on {most:.4g}."
    )
    return Part("data", "Repeated data", rows, warning if repeats_too_often(tokens, unique_tokens) else "")


def _size(question: Question) -> Sizing:
    if question.flops is not None:
        return size("flops", question.flops)
    if question.parameters is not None:
        return size("parameters", question.parameters)
    assert question.tokens is not None
    return size("tokens", question.tokens)


def _compute(compute: Compute) -> Part:
    rows = (
        Row("gpus", "GPUs", "", compute.gpus),
        Row("seconds", "seconds", f"{compute.days:g} days * {SECONDS_PER_DAY}", compute.days * SECONDS_PER_DAY),
        Row("peak", "dense bf16 FLOP/s of one", f"peak of {compute.gpu}", compute.peak),
        Row("mfu", "model FLOPs utilisation", "of 6 * N * D; 0.4 is assumed unless --mfu is given", compute.mfu),
        Row("flops", "training FLOPs", "GPUs * seconds * FLOP/s * utilisation", compute.flops),
    )
    return Part("compute", "Compute of these GPUs", rows)


def _optimum(sizing: Sizing) -> Part:
    rows = []
    for each in sizing.optima:
        name, ratio = each.fit.name, each.tokens / each.parameters
        if sizing.given != "parameters":
            rows.append(Row(f"parameters {name}", f"parameters, {name}", each.fit.source, each.parameters))
        if each is sizing.best and sizing.given != "parameters":
            rows += _interval("parameters", sizing.parameters)
        if sizing.given != "tokens":
            source = each.fit.source if sizing.given == "parameters" else f"6 * N * D = {each.flops:.4g}"
            how = f"{ratio:.2f} per parameter; {source}"
            rows.append(Row(f"tokens {name}", f"tokens, {name}", how, each.tokens))
        if each is sizing.best and sizing.given != "tokens":
            rows += _interval("tokens", sizing.tokens)
    best = sizing.best
    rows.append(Row("flops", "training FLOPs", f"6 * {best.parameters:.4g} * {best.tokens:.4g}", best.flops))
    rows.append(Row("loss", "predicted loss", _formula(best.parameters, best.tokens), sizing.loss))
    title = f"Compute-optimal for {sizing.amount:.4g} {_WORDS[sizing.given]}; the first fit is the default"
    return Part(_KEYS[sizing.given], title, tuple(rows))


def _interval(what: str, interval: Interval) -> list[Row]:
    how = "80 % of refits to resampled data"
    return [
        Row(f"{what} low", f"  {what}, at least", how, interval.low),
        Row(f"{what} high", f"  {what}, at most", how, interval.high),
    ]


def _formula(parameters: float, tokens: float) -> str:
    fit = DEFAULT_FIT
    of_parameters = f"{fit.parameter_scale} / {parameters:.4g}^{fit.parameter_exponent}"
    return f"{fit.irreducible} + {of_parameters} + {fit.token_scale} / {tokens:.4g}^{fit.token_exponent}"


def _rounding_trap(flops: float) -> Part:
    def ratio(fit: LossFit | PowerLaw) -> float:
        parameters, tokens = fit.optimal_for_compute(flops)
        return tokens / parameters

    def row(key: str, label: str, rounded: LossFit | PowerLaw, exact: LossFit | PowerLaw) -> Row:
        how = f"tokens per parameter at {flops:.4g} FLOPs, {ratio(rounded):.1f} / {ratio(exact):.1f}"
        return Row(key, label, how, ratio(rounded) / ratio(exact))

    rows = (
        row("approach_3", "Hoffmann approach 3, printed / unrounded", HOFFMANN_3, HOFFMANN_3_UNROUNDED),
        row("llama_3", "Llama 3, text / legend", LLAMA_3_ROUNDED, LLAMA_3),
    )
    note = (
        "Constants printed to two digits contradict the very fit they come from: use them unrounded. Approach 3 "
        f"disagrees with approaches 1 and 2 of its own paper even so; {DEFAULT_FIT.name} fitted its data again."
    )
    return Part("rounding_trap", "The rounding trap", rows, note)


def _over_training(sizing: Sizing) -> Part:
    rows = [row for share in SMALLER for row in _smaller(sizing.best, share)]
    return Part("over_training", "Over-training: smaller models for the same compute", tuple(rows))


def _smaller(best: Optimum, share: float) -> list[Row]:
    smaller, times = over_trained(best, share), round(1 / share)
    key = f"1/{times}"
    how = f"{best.parameters:.4g} / {times}"
    penalty = f"{smaller.loss:.4f} - {smaller.best_loss:.4f} of the best size"
    enough = f"best size that reaches {smaller.loss:.4f}, over this compute"
    return [
        Row(f"parameters {key}", f"{key} of the size: parameters", how, smaller.parameters),
        Row(f"tokens {key}", "  tokens", f"{best.tokens:.4g} * {times}", smaller.tokens),
        Row(f"loss {key}", "  predicted loss", _formula(smaller.parameters, smaller.tokens), smaller.loss),
        Row(f"penalty {key}", "  penalty", penalty, smaller.penalty, decimals=4),
        Row(f"sufficient_compute {key}", "  compute that would do", enough, smaller.sufficient_compute),
        Row(f"inference {key}", "  FLOPs of a generated token", "2 * N, over the best size's", share),
    ]


def _loss(parameters: float, tokens: float) -> Part:
    pair = compare(parameters, tokens)
    best, difference = pair.best, f"{pair.loss:.4f} - {pair.best_loss:.4f}"
    enough = f"best size that reaches {pair.loss:.4f}, over this compute"
    rows = (
        Row("loss", "predicted loss", _formula(parameters, tokens), pair.loss),
        Row("flops", "training FLOPs", f"6 * {parameters:.4g} * {tokens:.4g}", best.flops),
        Row("optimal_parameters", "best size at equal compute", f"{DEFAULT_FIT.name}", best.parameters),
        Row("optimal_tokens", "its tokens", f"{best.flops:.4g} / (6 * {best.parameters:.4g})", best.tokens),
        Row("optimal_loss", "its predicted loss", "same fit", pair.best_loss),
        Row("penalty", "penalty for this size", difference, pair.penalty, decimals=4),
        Row("sufficient_compute", "compute that would do", enough, pair.sufficient_compute),
    )
    title = f"Predicted loss on the fit's own corpus ({DEFAULT_FIT.name}, {DEFAULT_FIT.source})"
    return Part("loss", title, rows)


def _recipe(parameters: float, tokens: float, vocab_size: int) -> list[Part]:
    """A shape, batch sizes and learning rates; where there is no shape, the sentence that says why."""
    try:
        shape = find_shape(parameters, vocab_size)
    except UserError as reason:
        return [Part("shape", "No Llama of this size", (), f"{reason}."), *_steps(parameters, parameters, tokens)]
    count = count_parameters(shape)
    layers = count.total - count.embedding - count.head
    return [_shape(shape, parameters), *_steps(count.total, layers, tokens)]


def _shape(shape: LlamaShape, wanted: float) -> Part:
    heads = f"{shape.hidden_size} / {shape.head_dim}"
    rows = (
        Row("vocab_size", "model.vocab_size", "--vocab is yours", shape.vocab_size),
        Row("hidden_size", "model.hidden_size", "", shape.hidden_size),
        Row("intermediate_size", "model.intermediate_size", "", shape.intermediate_size),
        Row("num_hidden_layers", "model.num_hidden_layers", "", shape.num_hidden_layers),
        Row("num_attention_heads", "model.num_attention_heads", heads, shape.num_attention_heads),
        Row("num_key_value_heads", "model.num_key_value_heads", "", shape.num_key_value_heads),
        Row("head_dim", "model.head_dim", "", shape.head_dim),
        Row("tie_word_embeddings", "model.tie_word_embeddings", "1 is true", int(shape.tie_word_embeddings)),
        Row("parameters", "parameters", f"{shape.parameters / wanted - 1:+.2%} of {wanted:.4g}", shape.parameters),
        Row("largest_tensor", "parallel.tensor up to", "divides heads, KV heads and width", shape.largest_tensor),
    )
    return Part("shape", "A Llama of this size", rows)


def _steps(parameters: float, without_tables: float, tokens: float) -> list[Part]:
    batch, rates = (law(parameters, without_tables, tokens) for law in (batch_tokens, learning_rates))
    return [
        _range("batch_tokens", "Tokens per step: train.global_batch_size * data.sequence_length", batch),
        _range("learning_rate", "Peak learning rate: optimizer.lr", rates),
    ]


def _range(key: str, title: str, found: Range) -> Part:
    rows = [Row(advice.name, advice.name, advice.source, advice.value) for advice in found.advice]
    rows += [Row("low", "least", "of these", found.low), Row("high", "most", "of these", found.high)]
    return Part(key, title, tuple(rows), "The laws disagree: begin within the range and measure.")
