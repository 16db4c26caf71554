"""What the sizing flags of `megallama plan` ask: numbers as they are typed, checked against each other. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megallama.errors import UserError
from megallama.layout.scaling_laws import FLOPS_PER_PARAMETER_AND_TOKEN

SECONDS_PER_DAY = 86_400
DEFAULT_GPU = "h100-80g"
# 6 * parameters * tokens a second over the dense bf16 peak. By this count published runs reached 0.37 to 0.51 on A100s
# (model card of Llama 2, README of TinyLlama) and 0.21 to 0.33 on H100s of 500 W (benchmarks of torchtitan); with
# attention counted as well, 0.41 to 0.48 on H100s of 700 W (README of Megatron-LM).
DEFAULT_MFU = 0.4


@dataclass(frozen=True)
class Compute:
    """`gpus` for `days`, each doing `mfu` * `peak` FLOP/s of 6 * parameters * tokens; attention is left out of it."""

    gpus: int
    days: float
    gpu: str
    peak: float
    mfu: float

    @property
    def flops(self) -> float:
        """Training FLOPs."""
        return self.gpus * self.days * SECONDS_PER_DAY * self.peak * self.mfu


def peak_flops(gpu: str, hardware: Path | None = None) -> float:
    """Dense bf16 FLOP/s of a GPU by its short name, such as h100-80g; UserError for one that is not known.

    `hardware` is a file that adds to those that are.
    """
    # pydantic and YAML take a quarter of a second, which sizing without GPUs need not wait for.
    from megallama.plan.hardware import find_gpu, load_hardware

    return find_gpu(gpu, load_hardware(hardware)).known("peak_tflops") * 1e12


_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


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


# Far beyond any run, and near enough that no power of it leaves the range of a float.
_FEWEST = 1000
"""Parameters or tokens of anything that is trained."""
_LARGEST = 1e30
DEFAULT_VOCAB_SIZE = 32_000


@dataclass(frozen=True)
class Flags:
    """As they were typed; None where one was not."""

    flops: str | None = None
    params: str | None = None
    tokens: str | None = None
    gpus: str | None = None
    days: str | None = None
    gpu: str | None = None
    mfu: str | None = None
    unique_tokens: str | None = None
    vocab: str | None = None

    def typed(self, *names: str) -> list[str]:
        """List those of these that were typed, as they were."""
        return [f"--{name.replace('_', '-')}={text}" for name in names if (text := getattr(self, name)) is not None]


@dataclass(frozen=True)
class Question:
    """Compute, or GPUs for days, or a size, or data, or a size with its data; or nothing, where no flag was typed."""

    flops: float | None
    parameters: float | None
    tokens: float | None
    compute: Compute | None
    unique_tokens: float | None
    vocab_size: int

    @property
    def asks(self) -> bool:
        """Whether there is anything to size."""
        return any(each is not None for each in (self.flops, self.parameters, self.tokens))


def read_flags(flags: Flags, hardware: Path | None = None) -> Question:
    """The question that the flags ask; UserError where one is not legal or contradicts another.

    `hardware` is a file that adds to the GPUs that are known.
    """
    flops = amount("--flops", flags.flops, "1e21")
    parameters = amount("--params", flags.params, "7e9 or 7B")
    tokens = amount("--tokens", flags.tokens, "2e12 or 2T")
    unique = amount("--unique-tokens", flags.unique_tokens, "5e11 or 500B")
    compute = _compute(flags, hardware)
    _refuse_contradictions(flags, flops, parameters, tokens, compute)
    return Question(
        flops=compute.flops if compute else flops,
        parameters=parameters,
        tokens=tokens,
        compute=compute,
        unique_tokens=unique,
        vocab_size=DEFAULT_VOCAB_SIZE if flags.vocab is None else count("--vocab", flags.vocab, 10**9, "32000"),
    )


def amount(option: str, text: str | None, example: str) -> float | None:
    """A number from 1 to 1e30, None for none; UserError for anything else, and where its B or T was forgotten."""
    if text is None:
        return None
    found = number(option, text, 1, _LARGEST, example)
    unit = example[-1]
    if found < _FEWEST and unit in "BT":
        raise UserError(f"{option}={text} is {found:g}, fewer than any model has; did you mean {text}{unit}?")
    return found


def _compute(flags: Flags, hardware: Path | None) -> Compute | None:
    if flags.gpus is None or flags.days is None:
        _refuse_half(flags)
        return None
    gpu = DEFAULT_GPU if flags.gpu is None else flags.gpu
    return Compute(
        gpus=count("--gpus", flags.gpus, 10**7, "64"),
        days=number("--days", flags.days, 0.01, 100_000, "30"),
        gpu=gpu,
        peak=peak_flops(gpu, hardware),
        mfu=DEFAULT_MFU if flags.mfu is None else number("--mfu", flags.mfu, 0.01, 1, "0.4"),
    )


def _refuse_half(flags: Flags) -> None:
    """UserError for a part of what makes a compute."""
    half, others = flags.typed("gpus", "days", "gpu", "mfu"), flags.typed("flops", "params", "tokens")
    if half and others:
        raise UserError(f"{half[0]} does not go with {others[0]}; leave one of them out")
    if half:
        missing = [text for name, text in (("gpus", "--gpus 64"), ("days", "--days 30")) if not flags.typed(name)]
        raise UserError(f"{half[0]} alone is no compute; add {' '.join(missing)}, or leave it out")


def _refuse_contradictions(
    flags: Flags, flops: float | None, parameters: float | None, tokens: float | None, compute: Compute | None
) -> None:
    others = flags.typed("flops", "params", "tokens")
    if compute is not None and others:
        gpus = " ".join(flags.typed("gpus", "days"))
        raise UserError(f"{others[0]} contradicts {gpus}, which is {compute.flops:.4g} FLOPs; leave one of them out")
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
