"""Which program a folder of weights is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megallama.errors import UserError
from megallama.formats.hugging_face import CONFIG, HuggingFace
from megallama.formats.meta import PARAMS, Meta
from megallama.formats.weights import Weights

READERS: dict[str, Callable[[Path], Weights]] = {"hf": HuggingFace, "meta": Meta}
"""What reads the folder of each program that describes the model whole, by the name that `--from` takes."""
MEGATRON = "megatron"
"""The name of the program whose folder may leave keys of `model` to the user."""
_TOLD_BY = {CONFIG: "hf", PARAMS: "meta"}


def program_of(folder: Path) -> str | None:
    """The key in READERS of what wrote `folder`, as its files tell; None if none of them did."""
    return next((program for name, program in _TOLD_BY.items() if (folder / name).is_file()), None)


def open_weights(folder: Path, program: str | None = None, told: Mapping[str, Any] | None = None) -> Weights:
    """The weights of `folder`, written by `program`, or by what its files tell. UserError if they cannot be read.

    `told` has the keys of `model` that the user gives, for a program that does not write all of them down.
    """
    program = program or program_of(folder)
    if program is None:
        raise UserError(
            f"{folder} has no {CONFIG} and no {PARAMS}; give the folder of a Hugging Face or Meta Llama, or use "
            "`megallama import --from megatron` for a checkpoint of Megatron's"
        )
    if program == MEGATRON:
        from megallama.formats.megatron import Megatron  # torch's distributed checkpoints, which few runs need

        return Megatron(folder, told)
    if program not in READERS:
        raise UserError(f"--from {program} is not known; expected {', '.join(READERS)} or {MEGATRON}")
    return READERS[program](folder)
