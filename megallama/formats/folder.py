"""Which program a folder of weights is of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megallama.errors import UserError
from megallama.formats.hugging_face import CONFIG, HuggingFace
from megallama.formats.meta import PARAMS, Meta
from megallama.formats.weights import Weights

READERS: dict[str, Callable[[Path], Weights]] = {"hf": HuggingFace, "meta": Meta}
"""What reads the folder of each program, by the name that `megallama import --from` takes."""
_TOLD_BY = {CONFIG: "hf", PARAMS: "meta"}


def program_of(folder: Path) -> str | None:
    """The key in READERS of what wrote `folder`, as its files tell; None if none of them did."""
    return next((program for name, program in _TOLD_BY.items() if (folder / name).is_file()), None)


def open_weights(folder: Path, program: str | None = None) -> Weights:
    """The weights of `folder`, written by `program`, or by what its files tell. UserError if they cannot be read."""
    program = program or program_of(folder)
    if program is None:
        raise UserError(f"{folder} has no {CONFIG} and no {PARAMS}; give the folder of a Hugging Face or Meta Llama")
    if program not in READERS:
        raise UserError(f"--from {program} is not known; expected {' or '.join(READERS)}")
    return READERS[program](folder)
