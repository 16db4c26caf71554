"""How many judges are enough, and what of a table stays when a part of the mutants runs again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import ROOT
from tests.mutants.every import MUTANTS
from tests.mutants.judges import Answer
from tests.mutants.mutant import Kind, Mutant
from tests.mutants.table import BEGIN, END, Verdict, row, write_rows, written


@pytest.mark.parametrize(
    ("kind", "reason", "answers", "enough"),
    [
        ("gradient", "", ["caught", "hangs"], True),
        ("gradient", "", ["caught", "missed"], False),
        ("gradient", "as one process does", ["caught", "missed"], True),
        ("other", "", ["missed", "caught"], True),
        ("other", "", ["missed", "not there"], False),
    ],
)
def test_gradients_need_two_judges_and_all_else_one(
    kind: Kind, reason: str, answers: list[Answer], enough: bool
) -> None:
    mutant = Mutant("m", "a.py", "x", "y", kind, "it", reason=reason)
    assert Verdict(mutant, dict(zip(("layers", "verify"), answers, strict=True))).enough is enough


def test_rows_stay_in_order_and_what_was_not_asked_stays_as_it_was(tmp_path: Path) -> None:
    page, (first, second, *_) = tmp_path / "page.md", MUTANTS
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    write_rows(page, [Verdict(second, {"layers": "caught", "verify": "missed"})])
    write_rows(page, [Verdict(first, {"verify": "hangs"}), Verdict(second, {"verify": "caught"})])
    before, begin, _, _, one, two, end, after = page.read_text().splitlines()
    assert (before, begin, end, after) == ("before", BEGIN, END, "after")
    assert one.startswith(f"| {first.name} | ") and one.endswith(" | - | - | hangs |")
    assert two.startswith(f"| {second.name} | ") and two.endswith(" | - | caught | caught |")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_page_has_every_mutant_as_it_is_and_caught_by_enough(mutant: Mutant) -> None:
    page = ROOT / "docs" / "verify.md"
    verdict = written(page)[mutant.name]
    assert verdict.enough
    assert row(verdict) in page.read_text().splitlines()
