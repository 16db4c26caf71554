"""The verdicts of `megallama verify` as a table for people or an object for scripts."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from megallama.verify.compare import Difference
from megallama.verify.verify import Report, Verdict


def print_report(report: Report, console: Console) -> None:
    """A row per layout: last loss, relative differences from one process, verdict."""
    table = Table(title="differences from one process, relative", title_justify="left")
    for column in (
        "layout",
        "ranks",
        "last loss",
        "loss",
        "first norm",
        "gradients",
        "later norms",
        "update",
        "resumed",
        "verdict",
    ):
        table.add_column(column, justify="left" if column in ("layout", "verdict") else "right", no_wrap=True)
    table.add_row("one process", "1", f"{report.reference.losses[-1]:.7f}", *["-"] * 6, "reference")
    for verdict in report.verdicts:
        table.add_row(*_row(verdict))
    console.print(table)
    for verdict in report.verdicts:
        for failure in verdict.failures:
            console.print(f"{verdict.layout.name}: {failure}", style="red", highlight=False)


def as_json(report: Report) -> str:
    """Everything in the table and more, as one object."""
    verdicts = [
        {"layout": v.layout.name, "ranks": v.layout.world_size, "passed": not v.failures}
        | {
            "resumed": v.resumed,
            "losses": v.losses,
            "failures": v.failures,
            "difference": asdict(v.difference) if v.difference else None,
        }
        for v in report.verdicts
    ]
    return json.dumps({"passed": report.passed, "losses": report.reference.losses, "layouts": verdicts}, indent=2)


def _row(verdict: Verdict) -> list[str]:
    layout, difference = verdict.layout, verdict.difference
    loss = f"{verdict.losses[-1]:.7f}" if verdict.losses else "-"
    resumed = f"{verdict.resumed:.1e}" if verdict.resumed is not None else "-"
    outcome = "[red]DIFFERS[/red]" if verdict.failures else "equal"
    return [layout.name, str(layout.world_size), loss, *_numbers(difference), resumed, outcome]


def _numbers(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["-"] * 5
    found = (difference.loss, difference.first_norm, difference.gradient, difference.norm, difference.update)
    return [f"{value:.1e}" for value in found]
