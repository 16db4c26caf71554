"""A plan that is read top to bottom, each number beside its arithmetic; or a plain dictionary of the same. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megallama.plan.memory.state import GIB

Number = int | float


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


def with_notes(parts: Iterable[Part]) -> dict[str, dict[str, Number | str]]:
    """Part key -> row key -> number, at full precision; the sentence below a part under `note`."""
    found: dict[str, dict[str, Number | str]] = {}
    for part in parts:
        found[part.key] = {row.key: row.value for row in part.rows}
        if part.note:
            found[part.key]["note"] = part.note
    return found


def render(parts: Iterable[Part], width: int) -> str:
    """The parts as tables of at most `width` characters; what is longer goes on in the next line of its column."""
    # rich takes a tenth of a second to import, which the first screen of a plan and scripts need not wait for.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        for part in (part for part in parts if not part.for_scripts):
            console.print(Text(part.title))
            if part.rows:
                table = Table("", "how", box=None, pad_edge=False, padding=(0, 2, 0, 0))
                table.add_column("figure", justify="right", no_wrap=True)
                for row in part.rows:
                    table.add_row(Text(row.label), Text(row.how), _written(row))
                console.print(table)
            if part.note:
                console.print(Text(part.note))
            console.print()
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _written(row: Row) -> str:
    if row.unit == "GiB":
        return f"{row.value / GIB:,.2f} GiB"
    if row.decimals is not None:
        return f"{row.value:,.{row.decimals}f} {row.unit}".strip()
    exact = isinstance(row.value, int) and row.value < 10**13
    # Learning rates would lose all but a digit to four decimals.
    scientific = row.value >= 1e5 or 0 < row.value < 1e-2
    number = f"{row.value:,}" if exact else f"{row.value:.4g}" if scientific else f"{row.value:,.4f}"
    return f"{number} {row.unit}".strip()
