"""What `megallama checkpoint` found, for people as lines and a table, for scripts as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from megallama.checkpoint.commands.difference import FieldDifference, TensorDifference
from megallama.checkpoint.commands.listing import Entry


def json_of(value: object) -> str:
    """One JSON object; what JSON has no number for is null."""
    return json.dumps(_finite(value), indent=2, default=str)


def print_entries(entries: Sequence[Entry], console: Console) -> None:
    """A row for each folder."""
    table = Table("step", "saved", "size", "loss", "validation", "layout", "")
    for column in table.columns[:-1]:
        column.no_wrap = True
    for entry in entries:
        losses = ["-" if loss is None else f"{loss:.4f}" for loss in (entry.loss, entry.validation_loss)]
        saved = "-" if entry.saved is None else _time(entry.saved)
        said = ", ".join([entry.condition, *entry.marks])
        table.add_row(str(entry.step), saved, _size(entry.bytes), *losses, entry.layout or "-", said)
    console.print(table, markup=False, highlight=False)


def print_sections(facts: Mapping[str, Any]) -> None:
    """A line for each fact, those that belong together under their name."""
    said: dict[str, Callable[[Any], object]] = {"saved": _time, "files": _file, "tensors": list}
    groups = {key: value for key, value in facts.items() if isinstance(value, Mapping)}
    for key, value in facts.items():
        if key not in groups:
            typer.echo(f"{key:8} {said.get(key, _plain)(value)}")
    for key, group in groups.items():
        typer.echo(f"\n{key}")
        width = max(map(len, group), default=0)
        for name, value in group.items():
            typer.echo(f"  {name:{width}}  {said.get(key, _plain)(value)}")


def print_difference(fields: Sequence[FieldDifference], tensors: Sequence[TensorDifference]) -> None:
    """A line for each value that differs and for each tensor."""
    for field in fields:
        typer.echo(f"{field.key}: {_plain(field.a)} in A, {_plain(field.b)} in B")
    width = max((len(tensor.name) for tensor in tensors), default=0)
    for tensor in tensors:
        numbers = tensor.why or f"largest {tensor.largest:.2e}  relative {tensor.relative:.2e}"
        typer.echo(f"{tensor.name:{width}}  {'equal to the bit' if tensor.equal else numbers}")
    typer.echo(f"{sum(tensor.equal for tensor in tensors)} of {len(tensors)} tensors are equal to the bit")


def _plain(value: object) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)


def _file(file: Mapping[str, Any]) -> str:
    return f"{_size(file['bytes'])}, sha256 {file['sha256']}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _size(count: float) -> str:
    """Bytes, in the unit that leaves at most three digits before the point."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} {units[0]}" if units[0] == "B" else f"{count:.1f} {units[0]}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
