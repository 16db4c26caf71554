"""Whether a checkpoint is of the run that would go on with it: its model, objective and data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

from megallama.checkpoint.reading.foreign import fitting, stretched
from megallama.checkpoint.state import DataIdentity, StageWeights, read_saved
from megallama.config.schema import ModelConfig, RunConfig
from megallama.config.train_keys import Objective
from megallama.errors import UserError
from megallama.layout.budget import Seen

Identify = Callable[[int, Seen], DataIdentity]
"""What a position in the run's data counts in, where its sequences have so many tokens and it is so far."""


def check_same_run(path: Path, config: RunConfig, identify: Identify) -> None:
    """UserError when the checkpoint of the run directory is of another model, objective or data than the run."""
    check_same_model(path, config.model, "run.dir")
    _check_same_objective(path, config.train.objective)
    _check_same_data(path, config, identify)


def check_same_model(path: Path, model: ModelConfig, named_by: str) -> None:
    """UserError when the checkpoint, which the key `named_by` leads to, is of another model than the run."""
    saved, wanted = fitting(read_saved(path).model), fitting(model)
    free = stretched(saved, wanted) if named_by == "checkpoint.init_from" else ()
    for key, value in wanted.items():
        if saved[key] != value and key not in free:
            theirs, ours = json.dumps(saved[key]), json.dumps(value)
            raise UserError(
                f"model.{key}={ours} differs from {theirs} in the checkpoint {path}; "
                f"use model.{key}={theirs}, or another {named_by}"
            )


def _check_same_objective(path: Path, objective: Objective) -> None:
    """UserError when the checkpoint's model has learnt something else than what the run trains it to do."""
    saved = read_saved(path).objective
    if saved != objective:
        raise UserError(
            f"train.objective={objective} differs from {saved} in the checkpoint {path}; use train.objective={saved}, "
            f"or another run.dir with checkpoint.init_from={path}"
        )


def _check_same_data(path: Path, config: RunConfig, identify: Identify) -> None:
    """UserError when a position in the checkpoint's data would be another position in the run's."""
    state, saved = (found := read_saved(path)).state, found.data
    now = config.data.sequence_length
    if config.data.pack == "one" and saved.sequence_length not in (None, now):
        raise UserError(
            f"data.sequence_length={now} differs from {saved.sequence_length} in the checkpoint {path}, and with "
            f"data.pack=one its position would point elsewhere; use data.sequence_length={saved.sequence_length}, or "
            f"another run.dir with checkpoint.init_from={path}"
        )
    data = identify(saved.sequence_length or now, state.seen)
    if saved.seed != data.seed:
        raise UserError(
            f"train.seed={data.seed} differs from {saved.seed} in the checkpoint {path}, so its position in the data "
            f"would point elsewhere; use train.seed={saved.seed}, or another run.dir with checkpoint.init_from={path}"
        )
    if saved.fingerprint != data.fingerprint:
        if differ := next((pair for pair in zip_longest(saved.mixture, data.mixture) if _differ(*pair)), None):
            before, after = _stage_words(*differ), _stage_words(*differ[::-1])
            later = max([state.step, *(stage.from_step + 1 for stage in saved.mixture)])
            raise UserError(
                f"what was read until step {state.step} is {before} in the checkpoint {path}, and {after} in the run; "
                f"leave it as it was and change a stage from_step={later} or later, or use another run.dir with "
                f"checkpoint.init_from={path}"
            )
        length = "" if saved.sequence_length else ", or data.sequence_length"
        source = "the sources of data.mixture" if data.mixture else "data.path"
        keys = f"{source}, data.pack, data.document_mask, data.truncate, data.pad"
        raise UserError(
            f"the data of the run ({keys} or the split{length}) is not that of the checkpoint {path}; "
            f"use the same data, or another run.dir with checkpoint.init_from={path}"
        )


def _parts(stage: StageWeights | None) -> dict[str, float]:
    """Of each source of a stage, its part of the samples, however the weights are written."""
    return {name: weight / sum(stage.weights.values()) for name, weight in stage.weights.items()} if stage else {}


def _differ(one: StageWeights | None, other: StageWeights | None) -> set[str]:
    """The sources that have not the same part in both; all where the stages begin at different steps."""
    parts, others = _parts(one), _parts(other)
    apart = one is None or other is None or one.from_step != other.from_step
    return {
        name
        for name in parts | others
        if apart or not math.isclose(parts.get(name, 0), others.get(name, 0), rel_tol=1e-9)
    }


def _stage_words(stage: StageWeights | None, other: StageWeights | None) -> str:
    """`data.mixture (web 0.6, books 0.4 from step 500)`: three of the sources that are not alike in `other`."""
    if stage is None:
        return f"no stage from_step={other.from_step}" if other and other.from_step else "data.path"
    found = sorted(_differ(stage, other))
    said = [f"{name} {stage.weights.get(name, 0):g}" for name in found[:3]]
    more = [f"{len(found) - 3} more"] if len(found) > 3 else []
    return f"data.mixture ({', '.join(said + more)} from step {stage.from_step})"
