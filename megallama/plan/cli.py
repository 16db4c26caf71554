"""`megallama plan`: what a run costs, before any of it is spent. Imports no torch, so it answers at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import get_type_hints

from megallama.plan.asked import Asked


def taking(command: Callable[[Asked], None]) -> Callable[..., None]:
    """`command` as a function whose parameters are the fields of `Asked`, which is what typer reads."""
    hints = get_type_hints(Asked, include_extras=True)

    def called(**words: object) -> None:
        command(Asked(**words))  # type: ignore[arg-type]

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    taken = [
        inspect.Parameter(one.name, kind, default=one.default, annotation=hints[one.name]) for one in fields(Asked)
    ]
    called.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    called.__annotations__, called.__doc__, called.__name__ = hints, command.__doc__, command.__name__
    return called


@taking
def plan(asked: Asked) -> None:
    """Plan a run: parameters, memory, step time and cost. Without CONFIG, find the best model and data for a budget.

    Examples: megallama plan configs/7b.yaml --gpus 128 --gpu h100; megallama plan --params 7B --tokens 1T --gpu a100
    """
    # The schema takes a quarter of a second to import, which other commands need not wait for.
    from megallama.plan.report.answers import answer

    answer(asked)
