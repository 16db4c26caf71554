"""What `bench.py` prints: one table of all rows, what they should show, and what was left out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

from rich.console import Console
from rich.table import Table

SCALES = {"ms": 1e3, "s": 1.0}
MIB = 2**20


@dataclass(frozen=True)
class Line:
    """One contender of a row."""

    row: str
    contender: str
    seconds: float
    """The median."""
    unit: str = "ms"
    """In which the seconds are shown; of SCALES."""
    spread: float | None = None
    """The range in which the middle half of the seconds lies."""
    ratio: float | None = None
    """Time of ours by that of this one: below 1 ours is faster."""
    of_floor: float | None = None
    """The floor's time by this one's."""
    memory_bytes: int | None = None
    """The most held at a time."""
    loss_difference: float | None = None
    """Largest relative difference of a loss from that of ours."""
    counted: str = ""
    """What else it was seen to do."""


@dataclass(frozen=True)
class Aim:
    """What a row should show."""

    what: str
    found: float
    bound: float
    at_most: bool = True

    @property
    def kept(self) -> bool:
        """Whether it does."""
        return self.found <= self.bound if self.at_most else self.found >= self.bound


@dataclass
class Found:
    """All that one row found."""

    lines: list[Line] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out and why, and what a number rests on."""
    wrong: list[str] = field(default_factory=list)
    """Contenders that did not do the same work, or a row that failed."""


def spread(values: Sequence[float]) -> float | None:
    """The range of the middle half; None of a single value."""
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4)
    return high - low


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of the ratio in each."""
    return median(one / other for one, other in zip(ours, theirs, strict=True))


def print_table(rows: dict[str, Found]) -> None:
    """The table, the aims and the notes."""
    # Off a terminal rich takes 80 columns, too few for the table.
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table()
    for name in ("row", "contender", "median", "spread", "ours / it", "of floor", "memory", "loss differs", "counted"):
        table.add_column(name, justify="left" if name in ("row", "contender", "counted") else "right")
    for found in rows.values():
        for line in found.lines:
            table.add_row(*cells(line), end_section=line is found.lines[-1])
    console.print(table)
    for name, found in rows.items():
        for aim in found.aims:
            sign = "at most" if aim.at_most else "at least"
            verdict = "kept" if aim.kept else "MISSED"
            console.print(f"{name}: {aim.what} {aim.found:.3f}, {sign} {aim.bound:g}: {verdict}", highlight=False)
        for text in [*found.notes, *(f"WRONG: {wrong}" for wrong in found.wrong)]:
            console.print(f"{name}: {text}", highlight=False, markup=False)


def cells(line: Line) -> list[str]:
    """One row of the table."""
    scale = SCALES[line.unit]

    def shown(value: float | None, form: str, unit: str = "") -> str:
        return "" if value is None else f"{value:{form}}{unit}"

    return [
        line.row,
        line.contender,
        f"{line.seconds * scale:.4g} {line.unit}",
        shown(None if line.spread is None else line.spread * scale, ".3g"),
        shown(line.ratio, ".3f"),
        shown(line.of_floor, ".1%"),
        shown(None if line.memory_bytes is None else line.memory_bytes / MIB, ",.0f", " MiB"),
        shown(line.loss_difference, ".1e"),
        line.counted,
    ]
