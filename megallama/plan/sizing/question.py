"""What a plan without a config asks: a budget of compute, a size, data, or a size with its data. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megallama.config.numbers import count, number
from megallama.errors import UserError
from megallama.hardware.gpus import find_gpu, load_hardware
from megallama.layout.scaling_laws import FLOPS_PER_PARAMETER_AND_TOKEN
from megallama.plan.asked import Asked, amount
from megallama.plan.sizing.sizing import Quantity

SECONDS_PER_DAY = 86_400
# 6 * parameters * tokens a second over the dense bf16 peak. By this count published runs reached 0.37 to 0.51 on A100s
# (model card of Llama 2, README of TinyLlama) and 0.21 to 0.33 on H100s of 500 W (benchmarks of torchtitan); with
# attention counted as well, 0.41 to 0.48 on H100s of 700 W (README of Megatron-LM).
DEFAULT_MFU = 0.4
DEFAULT_VOCAB_SIZE = 32_000


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
class Question:
    """One quantity, or a size with its data."""

    quantities: Mapping[Quantity, float]
    """FLOPs, parameters or tokens; or the latter two."""
    ratio: float | None
    """Tokens per parameter that are wanted; the compute-optimal ones where None."""
    days: float | None
    """Of a budget in GPUs and days."""
    compute: Compute | None
    """What the run is to be trained on, where a kind of GPU was named."""
    vocab_size: int

    @property
    def pair(self) -> tuple[float, float] | None:
        """Parameters and tokens where both follow from what was typed; None where a fit is to choose the other."""
        if self.ratio is None:
            both = len(self.quantities) == 2
            return (self.quantities["parameters"], self.quantities["tokens"]) if both else None
        ((name, value),) = self.quantities.items()
        of_compute = math.sqrt(value / FLOPS_PER_PARAMETER_AND_TOKEN / self.ratio)
        parameters = {"parameters": value, "tokens": value / self.ratio, "flops": of_compute}[name]
        return parameters, self.ratio * parameters


def read_question(asked: Asked) -> Question:
    """The question that the words ask; UserError where one is not legal or contradicts another."""
    _refuse_contradictions(asked)
    days = None if asked.days is None else number("--days", asked.days, 0.01, 100_000, "30")
    vocab_size = DEFAULT_VOCAB_SIZE if asked.vocab is None else count("--vocab", asked.vocab, 10**9, "32000")
    each = asked.tokens_per_param
    ratio = None if each is None else number("--tokens-per-param", each, 0.01, 1e6, "20")
    typed: dict[Quantity, float | None] = {
        "flops": amount("--flops", asked.flops, "1e21"),
        "parameters": amount("--params", asked.params, "7e9 or 7B"),
        "tokens": asked.length(),
    }
    compute = _compute(asked)
    if compute is not None and days is not None:
        typed["flops"] = compute.flops(days)
    quantities = {name: value for name, value in typed.items() if value is not None}
    return Question(quantities, ratio, days, compute, vocab_size)


def _refuse_contradictions(asked: Asked) -> None:
    """UserError unless one word sizes the run, or its size and its data are both given."""
    sizes: list[str] = [name for name in ("params", "tokens", "flops", "days") if name in asked.given]
    if not sizes:
        idle = f" for {asked.typed(asked.given[0])}" if asked.given else ""
        what = "give a CONFIG such as configs/7b.yaml, or --flops, --params, --tokens, or --days with --gpus and --gpu"
        raise UserError(f"nothing to plan{idle}; {what}")
    if sizes == ["params", "tokens"]:
        sizes = ["params", "tokens_per_param"] if asked.tokens_per_param is not None else ["params"]
    if len(sizes) > 1:
        one, other = asked.typed(sizes[-1]), asked.typed(sizes[0])
        raise UserError(f"{one} contradicts {other}, since either sizes the run; leave one of them out")


def _compute(asked: Asked) -> Compute | None:
    if asked.gpu is None:
        if asked.gpus is not None:
            raise UserError(f"--gpus={asked.gpus} needs --gpu; add --gpu h100, or leave it out")
        return None
    gpus = None if asked.gpus is None else count("--gpus", asked.gpus, 10**7, "64")
    mfu, price = asked.assumed_mfu(), asked.money_per_hour()
    peak = find_gpu(asked.gpu, load_hardware(asked.hardware)).known("peak_tflops") * 1e12
    return Compute(gpus, asked.gpu, peak, DEFAULT_MFU if mfu is None else mfu, price)
