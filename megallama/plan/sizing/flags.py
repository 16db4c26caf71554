"""What the sizing flags of `megallama plan` ask, checked against each other. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megallama.errors import UserError
from megallama.layout.scaling_laws import FLOPS_PER_PARAMETER_AND_TOKEN
from megallama.plan.sizing.quantity import count, number
from megallama.plan.time.compute import DEFAULT_GPU, DEFAULT_MFU, Compute, peak_flops

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
