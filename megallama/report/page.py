"""Records of runs as one HTML file, which holds its script and style and asks the network for nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from megallama.report.curves import PLOTS, Curve
from megallama.report.marks import MARKS, RETURNED, Mark
from megallama.report.record import Record

_DIGITS = 7
"""Significant digits of the values: those of a float of 32 bits."""
_HOUR_DIGITS = 6
"""After the point: milliseconds."""


def draw_page(records: Sequence[Record], differing: dict[str, list[str]]) -> bytes:
    """The page of some runs. `differing`: the values of each run by the keys of their configs that differ."""
    folder, ranks = files("megallama.report"), _rows([record.ranks for record in records])
    parts = {
        "TITLE": escape(", ".join(record.name for record in records)),
        "STYLE": (folder / "page.css").read_text(),
        "SCRIPT": (folder / "page.js").read_text(),
        "FACTS": _table(records, _rows([record.facts for record in records])),
        "SLOWEST": f"<h2>Slowest ranks</h2>{_table(records, ranks)}" if ranks else "",
        "DIFFERING": f"<h2>Where the configs differ</h2>{_table(records, differing)}" if differing else "",
        "DATA": _script_data(_data(records)),
    }
    # Split once: what is put in is not searched for names of parts, which a run could be called by.
    pieces = (folder / "page.html").read_text().split("@@")
    return "".join(parts[piece] if at % 2 else piece for at, piece in enumerate(pieces)).encode("utf-8", "replace")


def _rows(columns: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """What each column says of every name that any of them has."""
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, "") for column in columns] for name in names}


def _table(records: Sequence[Record], rows: dict[str, list[str]]) -> str:
    """A column for each run."""
    head = "".join(
        f'<th scope="col"><i class="run c{at % 8}"></i>{escape(record.name)}</th>' for at, record in enumerate(records)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>'
        for name, values in rows.items()
    )
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"


def _data(records: Sequence[Record]) -> dict[str, Any]:
    return {
        "runs": [
            {
                "name": record.name,
                "curves": [_curve(curve) for curve in record.curves],
                "marks": [_mark(mark) for mark in record.marks],
            }
            for record in records
        ],
        "plots": [
            {
                "key": plot.key,
                "title": plot.title,
                "unit": plot.unit,
                "logarithmic": plot.logarithmic,
                "parts": plot.parts,
            }
            for plot in PLOTS
        ],
        "marks": MARKS,
        "returned": RETURNED,
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "plot": curve.plot,
        "name": curve.name,
        "style": curve.style,
        "steps": [where.step for where in curve.positions],
        "tokens": [round(where.tokens) for where in curve.positions],
        "hours": [round(where.hours, _HOUR_DIGITS) for where in curve.positions],
        "values": [_rounded(value) for value in curve.values],
    }


def _mark(mark: Mark) -> dict[str, Any]:
    where = mark.position
    return {
        "kind": mark.kind,
        "steps": where.step,
        "tokens": round(where.tokens),
        "hours": round(where.hours, _HOUR_DIGITS),
        "text": mark.text,
        "stands": mark.stands,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")


def _script_data(data: dict[str, Any]) -> str:
    """JSON that ends no script element and begins no comment in one, whatever the strings in it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
