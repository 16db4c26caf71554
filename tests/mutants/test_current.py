"""The mutants are of the source as it is: what each replaces stands there once, and what it becomes is Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import megallama
from megallama.layout.names import parse_layout
from tests.mutants.every import MUTANTS
from tests.mutants.mutant import Mutant

PACKAGE = Path(megallama.__file__).parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_replaces_what_stands_there_once_by_other_python(mutant: Mutant) -> None:
    mutated = mutant.applied(PACKAGE)
    assert mutated != (PACKAGE / mutant.path).read_text()
    compile(mutated, mutant.path, "exec")


def test_there_are_forty_mutants_at_least_and_no_two_of_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    for mutant in MUTANTS:
        parse_layout(mutant.layout)


def test_text_that_is_gone_or_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for old, times in (("x = 2", 0), ("x = 1", 2)):
        with pytest.raises(ValueError, match=f"mutant m: .* stands {times} times in megallama/a.py, not once"):
            Mutant("m", "a.py", old, "", "other", "").applied(tmp_path)
