"""Make one mistake at a time in a copy of the package, and see who catches it.

A mistake of gradients must be caught by two of types, layer tests and verify, any other by one; exit code 1 where one
is not.

Example: python -m tests.mutants --only copy-to-sums-nothing --only norm-without-mark
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer

from tests.launching import ROOT
from tests.mutants.every import MUTANTS
from tests.mutants.judges import CAUGHT, JUDGES, Copy, ask, copied
from tests.mutants.mutant import Mutant
from tests.mutants.table import Verdict, heading, row, write_rows

PAGE = ROOT / "docs" / "verify.md"


def main(
    only: Annotated[list[str] | None, typer.Option(help="The name of a mutant; may be given again.")] = None,
    part: Annotated[str, typer.Option(help="K/N: every N-th mutant from the K-th on.")] = "1/1",
    judges: Annotated[str, typer.Option(help="Whom to ask, separated by commas.")] = ",".join(JUDGES),
    write: Annotated[bool, typer.Option(help="Write the rows into docs/verify.md; others stay.")] = False,
) -> None:
    """Judge mutants, print the table, and exit with 1 if too few judges catch one."""
    first, count = map(int, part.split("/"))
    chosen = [m for m in MUTANTS if not only or m.name in only][first - 1 :: count]
    unknown = sorted(set(only or []) - {mutant.name for mutant in MUTANTS})
    if unknown:
        raise typer.BadParameter(f"no mutant is called {', '.join(unknown)}")
    with copied() as copy:
        asked = there(copy, chosen, judges.split(","))
        print(heading())
        verdicts = []
        for mutant in chosen:
            verdicts.append(judge(copy, mutant, asked))
            if write:  # at once: the next may be ended
                write_rows(PAGE, verdicts)
    survivors = [verdict.mutant.name for verdict in verdicts if not verdict.enough]
    print(f"{len(verdicts)} mutants, {len(survivors)} caught by too few: {', '.join(survivors) or 'none'}", flush=True)
    sys.exit(bool(survivors))


def there(copy: Copy, mutants: list[Mutant], judges: list[str]) -> list[str]:
    """The judges that can be asked. RuntimeError where one finds fault with the tree as it is."""
    found = []
    for name in judges:
        answer, printed = ask(name, copy, mutants)
        if answer in CAUGHT:
            raise RuntimeError(f"{name} finds fault with what is no mutant:\n{printed}")
        found += [name] if answer == "missed" else []
    return found


def judge(copy: Copy, mutant: Mutant, judges: list[str]) -> Verdict:
    """What each judge says, all at once, since each waits for its processes to start; the row is printed."""
    began = time.monotonic()
    with copy.mutated(mutant), ThreadPoolExecutor() as pool:
        said = dict(zip(judges, pool.map(lambda name: ask(name, copy, [mutant]), judges), strict=True))
    for name, (_, printed) in said.items():
        print(f"  {name}: {' / '.join(printed.strip().splitlines()[-3:])}", file=sys.stderr, flush=True)
    verdict = Verdict(mutant, {name: answer for name, (answer, _) in said.items()})
    print(row(verdict), flush=True)
    print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return verdict


if __name__ == "__main__":
    typer.run(main)
