"""Whether a checkpoint is what its format promises, to the last number: more than a start of a run asks of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from megallama.checkpoint.format import (
    STATE,
    Manifest,
    TornCheckpointError,
    damaged_files,
    read_document,
    read_manifest,
)
from megallama.checkpoint.tensors import MOMENTS, Shape, Stored, moment_name
from megallama.config.schema import ModelConfig
from megallama.plan.weights import weight_shapes

Report = Callable[[str], None]
"""Takes what is being read, for a person who waits."""


def inspect(path: Path, report: Report = lambda _: None) -> list[str]:
    """Everything that is wrong with the checkpoint at `path`, a reason each: empty if nothing is.

    Each file is held against its hash. If those agree, each tensor of the model must be there with both moments, of
    the right shape, each element in one chunk, and finite. Reads everything, a tensor in memory at a time. UserError
    for a format that this version does not know.
    """
    try:
        manifest = read_manifest(path)
        damaged = []
        for name in sorted(manifest.files):
            report(f"{path.name}: {name}")
            damaged += damaged_files(path, manifest, [name])
        return damaged or [*_state_reasons(path, manifest), *_tensor_reasons(path, report)]
    except TornCheckpointError as error:
        return [str(error)]


def expected_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a checkpoint of `model`: its weights, and two moments of each."""
    weights = weight_shapes(model)
    moments = {moment_name(moment, name): shape for moment in MOMENTS for name, shape in weights.items()}
    return weights | moments


def _state_reasons(path: Path, manifest: Manifest) -> Iterator[str]:
    state = read_document(path).get("state")
    step = state.get("step") if isinstance(state, dict) else None
    if step != manifest.step:
        yield f"{STATE} says step {step}, and the manifest {manifest.step}"


def _tensor_reasons(path: Path, report: Report) -> Iterator[str]:
    stored = Stored(path)
    try:
        expected = expected_shapes(ModelConfig.model_validate(read_document(path).get("model")))
    except ValidationError as error:
        yield f"{STATE} names no model: {error.errors()[0]['msg']}"
        return
    yield from _listed("missing", [name for name in expected if name not in stored.shapes])
    yield from _listed("not of the model", [name for name in stored.shapes if name not in expected])
    for name, shape in stored.shapes.items():
        if shape != expected.get(name, shape):
            yield f"{name} has the shape {list(shape)}, and in the model {list(expected[name])}"
        report(f"{path.name}: {name}")
        wrong = math.prod(shape) - int(np.isfinite(stored.read(name)).sum())
        if wrong:
            yield f"{name} is not finite in {wrong} of {math.prod(shape)} elements"


def _listed(what: str, names: Sequence[str]) -> Iterator[str]:
    """One reason for all of them: a checkpoint of another model lacks hundreds."""
    if names:
        others = f" and {len(names) - 1} more tensors are" if len(names) > 1 else " is"
        yield f"{names[0]}{others} {what}"
