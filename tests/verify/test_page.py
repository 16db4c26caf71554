"""The bounds that docs/verify.md prints are those that are applied, and its sample shows layouts by their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megallama.layout.names import parse_layout
from megallama.verify.compare import BOUNDS

PAGE = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()


@pytest.mark.parametrize(("dtype", "column"), [("fp32", -2), ("bf16", -1)])
def test_the_table_of_bounds(dtype: str, column: int) -> None:
    table = PAGE[PAGE.index("| column |") :].partition("\n\n")[0]
    head, _, *rows = re.findall(r"^\|.*\|$", table, re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in (head, *rows)]
    assert cells[0][column] == f"bound {dtype}"
    printed = {row[0]: float(row[column]) for row in cells[1:]}
    bounds = BOUNDS[dtype]
    assert printed == {
        "loss": bounds.loss,
        "first norm": bounds.first_norm,
        "gradients": bounds.gradient,
        "later norms": bounds.norm,
        "update": bounds.update,
    }


def test_the_layouts_of_the_sample_are_those_of_its_command() -> None:
    command = re.search(r"--layouts (\S+)", PAGE)
    assert command is not None
    shown = re.findall(r"^(\S+) +\d+ .* equal$", PAGE, re.MULTILINE)
    assert shown == [parse_layout(name).name for name in command[1].split(",")]
