"""Whether a checkpoint is what its format promises, to the last number. Every reader asks here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path

import numpy as np

from megallama.checkpoint.format import STATE, TornCheckpointError, damaged_files, plain, read_manifest
from megallama.checkpoint.state import read_saved
from megallama.checkpoint.tensors import EXP_AVG_SQ, MOMENTS, Shape, Stored, average_name, moment_name
from megallama.config.schema import ModelConfig
from megallama.errors import UserError
from megallama.layout.counts import weight_shapes

_SECOND_MOMENT = moment_name(EXP_AVG_SQ, "")
Report = Callable[[str], None]
"""Takes what is being read, for a person who waits."""


def inspect(path: Path, report: Report = lambda _: None) -> list[str]:
    """Everything that is wrong with the checkpoint at `path`, a reason each: empty if nothing is.

    Each file is held against its hash. If those agree, what they say is: `promised`, and that every number is one that
    training can have. Reads everything, a file in memory at a time. UserError for a format that this version does not
    know.
    """
    try:
        manifest = read_manifest(path)
        names = sorted(manifest.files)
        damaged = []
        for name in names:
            report(f"{path.name}: {name}")
            damaged += damaged_files(path, manifest, [name])
        return damaged or wrong_numbers(promised(path), names, lambda name: report(f"{path.name}: numbers of {name}"))
    except TornCheckpointError as error:
        return [str(error)]


def promised(path: Path) -> Stored:
    """The tensors of the checkpoint at `path`, whose JSON files say what docs/checkpoint-format.md promises.

    Step, position and model are possible ones; each tensor of the model is there, with both moments unless it was
    frozen and its average if there is one, and no other, of the right shape, each element in one place and each place
    for one element.
    TornCheckpointError where that is not so; no number is read. UserError for a format that this version does not know.
    """
    saved, stored = read_saved(path), Stored(path)
    model = saved.model
    if model.num_hidden_layers > len(stored.shapes):  # before its tensors are counted up: it may say a billion
        raise TornCheckpointError(f"{STATE} says {model.num_hidden_layers} layers, of which tensors are missing")
    try:
        expected = expected_shapes(model, saved.frozen, averaged=saved.average is not None)
    except UserError as error:
        raise TornCheckpointError(f"{STATE}: {error}") from None
    _refuse("missing", [name for name in expected if name not in stored.shapes])
    _refuse("not of the model", [name for name in stored.shapes if name not in expected])
    for name, shape in stored.shapes.items():
        if shape != expected[name]:
            raise TornCheckpointError(f"{name} has the shape {list(shape)}, and in the model {list(expected[name])}")
    return stored


def wrong_numbers(stored: Stored, files: Iterable[str], report: Report = lambda _: None) -> list[str]:
    """The tensors with numbers in `files` that training cannot have, a reason each.

    Those are NaN and infinities, and a second moment below zero.
    """
    infinite, negative = dict[str, int](), dict[str, int]()
    for file in files:
        report(file)
        for name, numbers in stored.numbers(file):
            # NaN goes through both; neither takes memory, which a mask of the elements would.
            least, most = float(numbers.min()), float(numbers.max())
            if not (math.isfinite(least) and math.isfinite(most)):
                infinite[name] = infinite.get(name, 0) + numbers.size - int(np.isfinite(numbers).sum())
            elif least < 0 and name.startswith(_SECOND_MOMENT):
                negative[name] = negative.get(name, 0) + int((numbers < 0).sum())
    sizes = {name: math.prod(stored.shapes[name]) for name in (*infinite, *negative)}
    return [
        *(f"{name} is not finite in {count} of {sizes[name]} elements" for name, count in infinite.items()),
        *(f"{name} is below zero in {count} of {sizes[name]} elements" for name, count in negative.items()),
    ]


def expected_shapes(model: ModelConfig, frozen: Set[str] = frozenset(), *, averaged: bool = False) -> dict[str, Shape]:
    """Every tensor of a checkpoint of `model`: its weights; of each that is not `frozen` two moments, and the average
    of an `averaged` one."""
    weights = weight_shapes(model)
    trained = {name: shape for name, shape in weights.items() if name not in frozen}
    found = weights | {moment_name(moment, name): shape for moment in MOMENTS for name, shape in trained.items()}
    return found | ({average_name(name): shape for name, shape in trained.items()} if averaged else {})


def _refuse(what: str, names: Sequence[str]) -> None:
    """One reason for all of them: a checkpoint of another model lacks hundreds."""
    if names:
        others = f" and {len(names) - 1} more tensors are" if len(names) > 1 else " is"
        raise TornCheckpointError(f"{plain(names[0])}{others} {what}")
