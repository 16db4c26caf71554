"""Sizes that cut a model evenly, and the legal values nearest to one that is not. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from megallama.config.schema import RunConfig


def legal_tensors(config: RunConfig) -> list[int]:
    """Every parallel.tensor that cuts evenly: heads, KV width, MLP width, and a rank's part of the sequence if cut."""
    model = config.model
    common = math.gcd(model.num_attention_heads, model.kv_heads * model.head_size, model.intermediate_size)
    if config.parallel.sequence is not False:
        common = math.gcd(common, config.data.sequence_length // config.parallel.context)
    return divisors(common)


def legal_contexts(config: RunConfig) -> list[int]:
    """Every parallel.context that cuts evenly: the sequence, what tensor parallelism cuts of it, heads in ulysses."""
    parallel = config.parallel
    tp = parallel.tensor if parallel.sequence_parallel else 1
    length, unit = config.data.sequence_length, math.lcm(2, tp)
    every = divisors(length // unit) if length % unit == 0 else [1]
    heads = math.gcd(*local_heads(config).values()) if parallel.context_mode == "ulysses" else 0
    return [n for n in every if heads % n == 0]


def local_heads(config: RunConfig) -> dict[str, int]:
    """Heads on each tensor-parallel rank, by key; key and value heads that tp does not divide are one a query head."""
    model, tp = config.model, config.parallel.tensor
    local = {"model.num_attention_heads": model.num_attention_heads // tp}
    return local if model.kv_heads % tp else local | {"model.num_key_value_heads": model.kv_heads // tp}


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest(legal: Sequence[int], value: int) -> list[int]:
    """The closest legal values on either side of `value`, which itself is not among them."""
    below, above = [n for n in legal if n < value], [n for n in legal if n > value]
    return below[-1:] + above[:1]


def nearest_multiples(value: int, unit: int) -> list[int]:
    """The positive multiples of `unit` on either side of `value`."""
    below = value // unit * unit
    return [below, below + unit] if below >= unit else [unit]


def either(numbers: Iterable[int]) -> str:
    """As `4 or 6`."""
    return " or ".join(str(number) for number in numbers)
