"""Numbers as people type them, 7e9 or 7B, and what is said where they are not legal. Pure."""

from __future__ import annotations

import math

from megallama.errors import UserError

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def number(option: str, text: str, low: float, high: float, example: str) -> float:
    """`7e9`, `7000000000` or `7B` as a number from `low` to `high`; UserError for anything else."""
    found = _parsed(text)
    if low <= found <= high:
        return found
    raise UserError(f"{option}={text} is not a number from {low} to {high}; {_fix(text, found, low, high, example)}")


def count(option: str, text: str, high: int, example: str) -> int:
    """A whole number from 1 to `high`; UserError for anything else."""
    found = _parsed(text)
    if 1 <= found <= high and found.is_integer():
        return int(found)
    fix = _fix(text, found, 1, high, example)
    raise UserError(f"{option}={text} is not a whole number from 1 to {high}; {fix}")


def _parsed(text: str) -> float:
    """Not a number where `text` is none."""
    unit = _SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        return float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        return math.nan


def _fix(text: str, found: float, low: float, high: float, example: str) -> str:
    """What to type instead of `text`."""
    if math.isnan(found):
        return f"write it as {example}"
    if low <= -found <= high:
        return f"did you mean {text.strip().removeprefix('-')}?"
    if high == 1 < found <= 100:  # A percentage, where a share is wanted.
        return f"did you mean {found / 100:g}?"
    if low <= found <= high:  # A fraction, where it has to be whole.
        return f"nearest legal: {math.floor(found)} or {math.ceil(found)}"
    return f"nearest legal: {low if found < low else high}"
