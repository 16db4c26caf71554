"""The sizing of a run as parts of a plan, read top to bottom. Pure."""

from __future__ import annotations

from megallama.errors import UserError
from megallama.layout.counts import count_parameters
from megallama.layout.scaling_laws import DEFAULT_FIT, FLOPS_PER_PARAMETER_AND_TOKEN
from megallama.plan.report.table import Part, Row
from megallama.plan.sizing.question import SECONDS_PER_DAY, Compute, Question
from megallama.plan.sizing.shape import find_shape
from megallama.plan.sizing.sizing import Quantity, compare, nearest_recipe, optima

_KEYS = {"flops": "optimum_for_flops", "parameters": "optimum_for_size", "tokens": "optimum_for_tokens"}
_WORDS = {"flops": "FLOPs", "parameters": "parameters", "tokens": "tokens"}


def plan_sizing(question: Question) -> list[Part]:
    """The compute-optimal rest of what is given, what it takes, a shape and a recipe; a size with data is compared."""
    compute, parts = question.compute, list[Part]()
    if compute is not None and question.days is not None:
        parts.append(_budget(compute, question.days))
    if question.pair is not None:
        parameters, tokens = question.pair
        parts += compared(parameters, tokens)
    else:
        ((given, amount),) = question.quantities.items()
        parts.append(optimum(given, amount))
        best = optima(given, amount)[0]
        parameters, tokens = best.parameters, best.tokens
    if compute is not None and question.days is None:
        parts.append(_cost(compute, FLOPS_PER_PARAMETER_AND_TOKEN * parameters * tokens))
    return [*parts, _shape(parameters, question.vocab_size), _recipe(parameters)]


def compared(parameters: float, tokens: float) -> list[Part]:
    """The loss of a size on its tokens beside the best of equal compute, and the tokens that would be best for it."""
    (best, penalty), loss = compare(parameters, tokens), DEFAULT_FIT.loss(parameters, tokens)
    rows = (
        Row("tokens_per_parameter", "tokens per parameter", f"{tokens:.4g} / {parameters:.4g}", tokens / parameters),
        Row("flops", "training FLOPs", f"6 * {parameters:.4g} * {tokens:.4g}", best.flops),
        Row("loss", "predicted loss", _formula(parameters, tokens), loss),
        Row("optimal_parameters", "best size at equal compute", DEFAULT_FIT.name, best.parameters),
        Row("optimal_tokens", "its tokens", f"{best.flops:.4g} / (6 * {best.parameters:.4g})", best.tokens),
        Row("penalty", "loss above that of the best size", "same fit", penalty, decimals=4),
    )
    title = f"Predicted loss on the fit's own corpus ({DEFAULT_FIT.name}, {DEFAULT_FIT.source})"
    return [Part("loss", title, rows), optimum("parameters", parameters)]


def optimum(given: Quantity, amount: float) -> Part:
    """What every fit holds best."""
    rows, found = [], optima(given, amount)
    for each in found:
        name, ratio = each.fit.name, each.tokens / each.parameters
        if given != "parameters":
            rows.append(Row(f"parameters {name}", f"parameters, {name}", each.fit.source, each.parameters))
        if given != "tokens":
            source = each.fit.source if given == "parameters" else f"6 * N * D = {each.flops:.4g}"
            rows.append(Row(f"tokens {name}", f"tokens, {name}", f"{ratio:.2f} per parameter; {source}", each.tokens))
    best = found[0]
    rows.append(Row("flops", "training FLOPs", f"6 * {best.parameters:.4g} * {best.tokens:.4g}", best.flops))
    loss = DEFAULT_FIT.loss(best.parameters, best.tokens)
    rows.append(Row("loss", "predicted loss", _formula(best.parameters, best.tokens), loss))
    title = f"Compute-optimal for {amount:.4g} {_WORDS[given]}; the first fit is the default"
    return Part(_KEYS[given], title, tuple(rows))


def _assumed(compute: Compute) -> list[Row]:
    return [
        Row("peak", "dense bf16 FLOP/s of one", f"peak of {compute.gpu}", compute.peak),
        Row("mfu", "model FLOPs utilisation", "assumed, of 6 * N * D: 0.4 unless --mfu is given", compute.mfu),
    ]


def _budget(compute: Compute, days: float) -> Part:
    assert compute.gpus is not None
    rows = (
        Row("gpus", "GPUs", "", compute.gpus),
        Row("seconds", "seconds", f"{days:g} days * {SECONDS_PER_DAY}", days * SECONDS_PER_DAY),
        *_assumed(compute),
        Row("flops", "training FLOPs", "GPUs * seconds * FLOP/s * utilisation", compute.flops(days)),
        *_money(compute, compute.gpus * days * 24),
    )
    return Part("compute", "Compute of these GPUs", rows)


def _cost(compute: Compute, flops: float) -> Part:
    """GPU-hours of so much training, the days that they are, and money."""
    hours = compute.gpu_hours(flops)
    rows = [*_assumed(compute), Row("gpu_hours", "GPU hours", f"{flops:.4g} FLOPs / rate", hours, "h", decimals=0)]
    if compute.gpus is not None:
        how = f"{hours:,.0f} h / {compute.gpus} GPUs / 24, without stops"
        rows.append(Row("days", "days", how, hours / compute.gpus / 24, "d"))
    return Part("cost", f"What it takes on {compute.gpu}", (*rows, *_money(compute, hours)))


def _money(compute: Compute, hours: float) -> list[Row]:
    if compute.price is None:
        return []
    return [Row("money", "money", f"{hours:,.0f} h * {compute.price:g}", hours * compute.price, decimals=2)]


def _formula(parameters: float, tokens: float) -> str:
    fit = DEFAULT_FIT
    of_parameters = f"{fit.parameter_scale} / {parameters:.4g}^{fit.parameter_exponent}"
    return f"{fit.irreducible} + {of_parameters} + {fit.token_scale} / {tokens:.4g}^{fit.token_exponent}"


def _shape(parameters: float, vocab_size: int) -> Part:
    """A shape, or the sentence that says why there is none."""
    try:
        shape = find_shape(parameters, vocab_size)
    except UserError as reason:
        return Part("shape", "No Llama of this size", (), f"{reason}.")
    total = count_parameters(shape).total
    how = {"vocab_size": "--vocab is yours", "num_attention_heads": f"{shape.hidden_size} / {shape.head_size}"}
    keys = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    keys += ["num_key_value_heads", "head_dim", "tie_word_embeddings"]
    rows = [Row(key, f"model.{key}", how.get(key, ""), int(getattr(shape, key))) for key in keys]
    rows.append(Row("parameters", "parameters", f"{total / parameters - 1:+.2%} of {parameters:.4g}", total))
    return Part("shape", "A Llama of this size", tuple(rows))


def _recipe(parameters: float) -> Part:
    """Where to begin; published laws for both differ twofold and more."""
    recipe = nearest_recipe(parameters)
    rows = (
        Row("batch_tokens", "tokens per step", f"{recipe.name}: {recipe.source}", recipe.batch_tokens),
        Row("learning_rate", "peak learning rate, optimizer.lr", recipe.name, recipe.learning_rate),
    )
    note = "train.global_batch_size counts sequences: divide by data.sequence_length. Begin there and measure."
    return Part("recipe", "Batch and learning rate of the published run nearest in size", rows, note)
