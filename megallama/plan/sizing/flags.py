"""What the sizing flags of `megallama plan` ask: numbers as they are typed, checked against each other. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from megallama.errors import UserError
from megallama.layout.scaling_laws import FLOPS_PER_PARAMETER_AND_TOKEN

SECONDS_PER_DAY = 86_400
DEFAULT_GPU = "h100-80g"
# 6 * parameters * tokens a second over the dense bf16 peak. By this count published runs reached 0.37 to 0.51 on A100s
# (model card of Llama 2, README of TinyLlama) and 0.21 to 0.33 on H100s of 500 W (benchmarks of torchtitan); with
# attention counted as well, 0.41 to 0.48 on H100s of 700 W (README of Megatron-LM).
DEFAULT_MFU = 0.4
DEFAULT_VOCAB_SIZE = 32_000
# Far beyond any run, and near enough that no power of it leaves the range of a float.
_LARGEST = 1e30
_FEWEST = 1000
"""Parameters or tokens of anything that is trained."""
_LEAST_FLOPS = 6.0 * _FEWEST**2
_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Compute:
    """GPUs of one kind, each doing `mfu` * `peak` FLOP/s of 6 * parameters * tokens; attention is left out of it."""

    gpus: int | None
    gpu: str
    peak: float
    """Dense bf16 FLOP/s."""
    mfu: float
    price: float | None
    """Money for one of them and an hour."""

    def flops(self, days: float) -> float:
        """Training FLOPs of so many days."""
        assert self.gpus is not None
        return self.gpus * days * SECONDS_PER_DAY * self.peak * self.mfu

    def gpu_hours(self, flops: float) -> float:
        """The hours of one GPU that so much training takes."""
        return flops / (self.peak * self.mfu * 3600)


@dataclass(frozen=True)
class Flags:
    """As they were typed; None where one was not."""

    flops: str | None = None
    params: str | None = None
    tokens: str | None = None
    tokens_per_param: str | None = None
    gpus: str | None = None
    days: str | None = None
    gpu: str | None = None
    mfu: str | None = None
    price: str | None = None
    unique_tokens: str | None = None
    vocab: str | None = None

    def typed(self, *names: str) -> list[str]:
        """List those of these that were typed, as they were."""
        return [f"--{name.replace('_', '-')}={text}" for name in names if (text := getattr(self, name)) is not None]

    @property
    def all_typed(self) -> list[str]:
        """All that were typed."""
        return self.typed(*(field.name for field in fields(self)))


@dataclass(frozen=True)
class Question:
    """Compute, or a size, or data, or a size with its data; or nothing, where no flag was typed."""

    flops: float | None
    parameters: float | None
    tokens: float | None
    ratio: float | None
    """Tokens per parameter that are wanted; the compute-optimal ones where None."""
    days: float | None
    """Of a budget in GPUs and days."""
    compute: Compute | None
    """What the run is to be trained on, where a kind of GPU was named or a budget in days."""
    unique_tokens: float | None
    vocab_size: int

    @property
    def asks(self) -> bool:
        """Whether there is anything to size."""
        return any(each is not None for each in (self.flops, self.parameters, self.tokens))

    def fixed_ratio(self) -> tuple[float, float] | None:
        """Parameters and tokens where both follow from what was typed; None where they are to be chosen."""
        if self.ratio is None:
            return None if self.parameters is None or self.tokens is None else (self.parameters, self.tokens)
        if self.parameters is not None:
            return self.parameters, self.ratio * self.parameters
        if self.tokens is not None:
            return self.tokens / self.ratio, self.tokens
        assert self.flops is not None
        parameters = math.sqrt(self.flops / FLOPS_PER_PARAMETER_AND_TOKEN / self.ratio)
        return parameters, self.ratio * parameters


def read_flags(flags: Flags, hardware: Path | None = None) -> Question:
    """The question that the flags ask; UserError where one is not legal or contradicts another.

    `hardware` is a file that adds to the GPUs that are known.
    """
    flops = amount("--flops", flags.flops, "1e21")
    parameters = amount("--params", flags.params, "7e9 or 7B")
    tokens = amount("--tokens", flags.tokens, "2e12 or 2T")
    unique = amount("--unique-tokens", flags.unique_tokens, "5e11 or 500B")
    ratio = flags.tokens_per_param
    _refuse_half(flags)
    days = None if flags.days is None else number("--days", flags.days, 0.01, 100_000, "30")
    compute = _compute(flags, hardware)
    budget = compute.flops(days) if compute is not None and days is not None else None
    _refuse_contradictions(flags, flops, parameters, tokens, budget)
    return Question(
        flops=budget if budget is not None else flops,
        parameters=parameters,
        tokens=tokens,
        ratio=None if ratio is None else number("--tokens-per-param", ratio, 0.01, 1e6, "20"),
        days=days,
        compute=compute,
        unique_tokens=unique,
        vocab_size=DEFAULT_VOCAB_SIZE if flags.vocab is None else count("--vocab", flags.vocab, 10**9, "32000"),
    )


def _compute(flags: Flags, hardware: Path | None) -> Compute | None:
    if flags.gpu is None and flags.days is None:
        return None
    # pydantic and YAML take a quarter of a second, which sizing without GPUs need not wait for.
    from megallama.plan.hardware import find_gpu, load_hardware

    gpu = DEFAULT_GPU if flags.gpu is None else flags.gpu
    return Compute(
        gpus=None if flags.gpus is None else count("--gpus", flags.gpus, 10**7, "64"),
        gpu=gpu,
        peak=find_gpu(gpu, load_hardware(hardware)).known("peak_tflops") * 1e12,
        mfu=DEFAULT_MFU if flags.mfu is None else number("--mfu", flags.mfu, 0.01, 1, "0.4"),
        price=None if flags.price is None else number("--price", flags.price, 0, 1e9, "2.5"),
    )


def _refuse_half(flags: Flags) -> None:
    """UserError for a flag without the one that it belongs to."""
    sized = flags.typed("flops", "params", "tokens")
    if flags.days is not None and flags.gpus is None:
        raise UserError(f"--days={flags.days} alone is no compute; add --gpus 64, or leave it out")
    if flags.days is None and flags.gpu is None and (half := flags.typed("gpus", "mfu", "price")):
        budget = "--days 30" if flags.gpus is not None else "--gpus 64 --days 30"
        fix = "--gpu h100 for how long it takes" if sized else budget
        raise UserError(f"{half[0]} alone is no compute; add {fix}, or leave it out")
    if flags.days is None and not sized and (half := flags.typed("gpu")):
        missing = "--days 30" if flags.gpus is not None else "--gpus 64 --days 30"
        raise UserError(f"{half[0]} alone is no compute; add {missing}, or --params 7B, or leave it out")


def _refuse_contradictions(
    flags: Flags, flops: float | None, parameters: float | None, tokens: float | None, budget: float | None
) -> None:
    others = flags.typed("flops", "params", "tokens")
    if budget is not None and others:
        gpus = " ".join(flags.typed("gpus", "days"))
        raise UserError(f"{others[0]} contradicts {gpus}, which is {budget:.4g} FLOPs; leave one of them out")
    if flags.tokens_per_param is not None and (len(others) > 1 or (not others and budget is None)):
        fix = "leave one of them out" if others else "add --params 7B, or leave it out"
        what = f"contradicts {' '.join(others)}" if others else "sizes nothing alone"
        raise UserError(f"--tokens-per-param={flags.tokens_per_param} {what}; {fix}")
    if flops is None or len(others) == 1:
        return
    each = FLOPS_PER_PARAMETER_AND_TOKEN
    if parameters is not None and tokens is not None:
        taken = each * parameters * tokens
        raise UserError(
            f"{others[0]} contradicts {others[1]} {others[2]}, which take 6 * N * D = {taken:.4g} FLOPs; leave it out"
        )
    option, other = ("--tokens", parameters) if parameters is not None else ("--params", tokens)
    assert other is not None
    rest = flops / each / other
    swap = f", or type {option}={rest:.4g} in place of {others[0]} for the same compute" if rest >= 1 else ""
    raise UserError(f"{others[0]} contradicts {others[1]}, since either sizes the other; leave one of them out{swap}")


def amount(option: str, text: str | None, example: str) -> float | None:
    """A number from 1 to 1e30, None for none; UserError for anything else, and where its B or T was forgotten."""
    if text is None:
        return None
    found = number(option, text, _LEAST_FLOPS if option == "--flops" else 1, _LARGEST, example)
    unit = example[-1]
    if found < _FEWEST and unit in "BT":
        raise UserError(f"{option}={text} is {found:g}, fewer than any model has; did you mean {text}{unit}?")
    return found


def number(option: str, text: str, low: float, high: float, example: str) -> float:
    """`7e9`, `7000000000` or `7B` as a number from `low` to `high`; UserError for anything else."""
    found = _parsed(text)
    if low <= found <= high:
        return found
    if math.isnan(found):
        bare = text.strip("$€£ ")
        fix = f"did you mean {bare}?" if low <= _parsed(bare) <= high else f"write it as {example}"
    elif low <= -found <= high:
        fix = _without_sign(text)
    elif high == 1 and 10 <= found <= 100:  # A percentage, where a share is wanted.
        fix = f"did you mean {found / 100:g}?"
    else:
        fix = f"nearest legal: {_short(low if found < low else high)}"
    raise UserError(f"{option}={text} is not a number from {_short(low)} to {_short(high)}; {fix}")


def count(option: str, text: str, high: int, example: str, low: int = 1) -> int:
    """A whole number from `low` to `high`; UserError for anything else."""
    found = _parsed(text)
    if low <= found <= high and found.is_integer():
        return int(found)
    if math.isnan(found):
        fix = f"write it as {example}"
    elif low <= -found <= high and found.is_integer():
        fix = _without_sign(text)
    elif low <= found <= high:
        fix = f"nearest legal: {math.floor(found)} or {math.ceil(found)}"
    else:
        fix = f"nearest legal: {low if found < low else high}"
    raise UserError(f"{option}={text} is not a whole number from {low} to {high}; {fix}")


def _parsed(text: str) -> float:
    """Not a number where `text` is none."""
    unit = _SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        return float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        return math.nan


def _without_sign(text: str) -> str:
    return f"did you mean {text.strip().removeprefix('-')}?"


def _short(value: float) -> str:
    """As people type it: 1e9, 100000, 0.01."""
    return f"{value:g}".replace("e+0", "e").replace("e+", "e")
