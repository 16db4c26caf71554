"""A plan that is read top to bottom, each number beside its arithmetic; or a plain dictionary of the same. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

Number = int | float
LEAST_WIDTH = 20
"""The least width of a column, in characters, however narrow the terminal is."""
_GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One figure: `key` names it in the dictionary, `label` to a reader; `how` is its arithmetic or its source."""

    key: str
    label: str
    how: str
    value: Number
    unit: str = ""
    decimals: int | None = None
    """The decimals of the figure as it is read; by its size where None."""


@dataclass(frozen=True)
class Part:
    """Rows under one heading, and a sentence below them where one is needed."""

    key: str
    title: str
    rows: tuple[Row, ...]
    note: str = ""
    for_scripts: bool = False
    """In the dictionary alone, since a reader has it in a shorter form."""


def as_dictionary(parts: Iterable[Part]) -> dict[str, dict[str, Number]]:
    """Part key -> row key -> number, at full precision."""
    return {part.key: {row.key: row.value for row in part.rows} for part in parts}


def with_notes(parts: Iterable[Part]) -> dict[str, dict[str, Number | str]]:
    """`as_dictionary` with the sentence of each part that has one, under `note`."""
    found: dict[str, dict[str, Number | str]] = {}
    for part in parts:
        found[part.key] = {row.key: row.value for row in part.rows}
        if part.note:
            found[part.key]["note"] = part.note
    return found


def render(parts: Iterable[Part], width: int) -> str:
    """The parts as tables of at most `width` characters; what is longer goes on in the next line of its column.

    By hand, since a library's tables take a quarter of the time in which a plan answers.
    """
    return "\n".join(_table(part, width) for part in parts if not part.for_scripts)


def _table(part: Part, width: int) -> str:
    return "\n".join([part.title, *(_lines(part, width) if part.rows else []), *textwrap.wrap(part.note, width), ""])


def _lines(part: Part, width: int) -> list[str]:
    rows = [("", "how", "figure"), *((row.label, row.how, _written(row)) for row in part.rows)]
    first, middle, last = (max(map(len, column)) for column in zip(*rows, strict=True))
    first = min(first, max(LEAST_WIDTH, (width - last) // 2))
    middle = min(middle, max(LEAST_WIDTH, width - first - last - 4))
    lines = []
    for label, how, figure in rows:
        cells = zip_longest(_folded(label, first), _folded(how, middle), [figure], fillvalue="")
        lines += [f"{a:{first}}  {b:{middle}}  {c:>{last}}".rstrip() for a, b, c in cells]
    return lines


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""] if len(text) > width else [text]


def _written(row: Row) -> str:
    if row.unit == "GiB":
        return f"{row.value / _GIB:,.2f} GiB"
    if row.decimals is not None:
        return f"{row.value:,.{row.decimals}f} {row.unit}".strip()
    exact = isinstance(row.value, int) and row.value < 10**13
    # Learning rates would lose all but a digit to four decimals.
    scientific = row.value >= 1e5 or 0 < row.value < 1e-2
    number = f"{row.value:,}" if exact else f"{row.value:.4g}" if scientific else f"{row.value:,.4f}"
    return f"{number} {row.unit}".strip()
