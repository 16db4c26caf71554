"""Numbers as they are typed on a command line: `7e9`, `7B`, `0.4`; and what is said of others. Imports no schema."""

from __future__ import annotations

import math

from megallama.errors import UserError

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


def _without_sign(text: str) -> str:
    return f"did you mean {text.strip().removeprefix('-')}?"


def _parsed(text: str) -> float:
    """Not a number where `text` is none."""
    unit = _SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        return float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        return math.nan


def _short(value: float) -> str:
    """As people type it: 1e9, 0.01."""
    return f"{value:g}".replace("e+0", "e").replace("e+", "e")
