"""The table of mutants and who catches each, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    return f"| mutant | what it breaks | kind | {' | '.join(JUDGES)} |\n|{' --- |' * (3 + len(JUDGES))}"


def row(verdict: Verdict) -> str:
    """Of one mutant."""
    mutant = verdict.mutant
    breaks = f"{mutant.breaks}; {mutant.reason}" if mutant.reason else mutant.breaks
    answers = [verdict.answers.get(name, "-") for name in JUDGES]
    return f"| {mutant.name} | {breaks} | {mutant.kind} | {' | '.join(answers)} |"


def write_rows(page: Path, verdicts: Sequence[Verdict]) -> None:
    """Put the rows between the marks of the page, in the order of the list; rows of other mutants stay."""
    before, _, rest = page.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    rows |= {verdict.mutant.name: row(verdict) for verdict in verdicts}
    kept = [rows[mutant.name] for mutant in MUTANTS if mutant.name in rows]
    page.write_text("\n".join([before + BEGIN, heading(), *kept, END + after]))
