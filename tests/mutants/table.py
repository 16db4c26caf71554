"""The table of mutants and who catches each, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tests.mutants.every import MUTANTS
from tests.mutants.judges import CAUGHT, JUDGES, Answer
from tests.mutants.mutant import Mutant

BEGIN, END = "<!-- mutants -->", "<!-- end of mutants -->"


@dataclass(frozen=True)
class Verdict:
    """What each judge that was asked says of a mutant."""

    mutant: Mutant
    answers: Mapping[str, Answer]

    @property
    def enough(self) -> bool:
        """Whether as many catch it as must."""
        caught = sum(answer in CAUGHT for answer in self.answers.values())
        return caught >= (2 if self.mutant.kind == "gradient" and not self.mutant.reason else 1)


def heading() -> str:
    """Of the table."""
    return f"| mutant | what it breaks | kind | at | {' | '.join(JUDGES)} |\n|{' --- |' * (4 + len(JUDGES))}"


def row(verdict: Verdict) -> str:
    """Of one mutant."""
    mutant = verdict.mutant
    breaks = f"{mutant.breaks}; {mutant.reason}" if mutant.reason else mutant.breaks
    answers = [verdict.answers.get(name, "-") for name in JUDGES]
    return f"| {mutant.name} | {breaks} | {mutant.kind} | {mutant.layout} | {' | '.join(answers)} |"


def write_rows(page: Path, verdicts: Sequence[Verdict]) -> None:
    """Put the rows between the marks of the page, in the order of the list; what was not asked stays as it was."""
    known = {name: verdict.answers for name, verdict in written(page).items()}
    known |= {v.mutant.name: {**known.get(v.mutant.name, {}), **v.answers} for v in verdicts}
    rows = [row(Verdict(mutant, known[mutant.name])) for mutant in MUTANTS if mutant.name in known]
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text("\n".join([before + BEGIN, heading(), *rows, END + rest.partition(END)[2]]))


def written(page: Path) -> dict[str, Verdict]:
    """The verdicts between the marks of the page, by name, of mutants that there still are."""
    table = page.read_text().partition(BEGIN)[2].partition(END)[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    answers = {name: dict(zip(JUDGES, row[-len(JUDGES) :], strict=True)) for name, *row in cells}
    return {m.name: Verdict(m, cast(dict[str, Answer], answers[m.name])) for m in MUTANTS if m.name in answers}
