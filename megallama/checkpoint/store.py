"""The checkpoints of a run directory: save, find, load.

A checkpoint is a folder `checkpoints/step_00001000` with the tensors of `checkpoint.logical`, metadata.json and
state.json. It is written under another name and renamed when whole, so a folder of that name is always complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megallama.checkpoint.logical import logical_state
from megallama.checkpoint.storage import (
    METADATA,
    JsonMetadataReader,
    JsonMetadataWriter,
    read_alone,
    stored_shapes,
    write_json,
)
from megallama.config.schema import ModelConfig, RunConfig
from megallama.errors import UserError
from megallama.model.chunks import Chunks
from megallama.parallel.mesh import ParallelMesh

if TYPE_CHECKING:
    from megallama.engine import Engine

STATE = "state.json"
LATEST = "latest"
BEST = "best"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class TrainState:
    """Everything that progresses, beside weights and moments."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Sequences consumed: the position in the data."""
    updates: int = 0
    """Steps whose update was applied; fewer than `step` where a gradient was not finite."""
    validation_loss: float | None = None
    """Of these very weights, where it was evaluated and is finite."""

    def after(self, samples: int, *, applied: bool) -> TrainState:
        """The state one step of `samples` sequences later."""
        return TrainState(self.step + 1, self.samples + samples, self.updates + applied)


@dataclass(frozen=True)
class DataIdentity:
    """What a position in the data refers to: another dataset or seed would make it point elsewhere, silently."""

    fingerprint: str
    seed: int


@dataclass(frozen=True)
class Start:
    """Where a run begins: a checkpoint to continue, else weights to begin from, else neither."""

    resume: Path | None = None
    weights: Path | None = None


def save(
    folder: Path,
    engine: Engine,
    model: Chunks,
    mesh: ParallelMesh,
    state: TrainState,
    data: DataIdentity,
    keep: int,
) -> Path:
    """Write a checkpoint of `state` under `folder`; every rank must call it.

    Of the older ones the newest `keep` stay, and the one of the best validation loss.
    """
    final = folder / f"step_{state.step:08d}"
    partial = folder / f".{final.name}.partial"
    if mesh.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(mesh.world.group)
    held = model.logical_pieces()
    if mesh.tp.rank > 0:
        # A piece that is the whole tensor is on every tp rank, bit for bit: the first writes it.
        held = {name: tuple(p for p in pieces if p.size != p.shape) for name, pieces in held.items()}
    dcp.save(logical_state(engine.fragments(), held), storage_writer=JsonMetadataWriter(partial))
    if mesh.rank == 0:
        content = {"state": asdict(state), "data": asdict(data), "model": model.config.model_dump(mode="json")}
        write_json(partial / STATE, content)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _replace_text(folder / LATEST, final.name)
        _drop_old(folder, keep)
    dist.barrier(mesh.world.group)
    return final


def load(path: Path, engine: Engine, model: Chunks) -> TrainState:
    """Overwrite weights, moments and position with those of `path`; every rank must call it."""
    state = read_state(path)
    dcp.load(dict(logical_state(engine.fragments(), model.logical_pieces())), storage_reader=JsonMetadataReader(path))
    engine.state_was_loaded(state.updates)
    return state


def load_initial_weights(path: Path, engine: Engine, model: Chunks) -> None:
    """Overwrite the weights alone with those of `path`: a new run from old weights. Every rank must call it."""
    _check_same_model(path, model.config, "checkpoint.init_from")
    state = logical_state(engine.fragments(), model.logical_pieces())
    weights = {name: tensor for name, tensor in state.items() if not name.startswith("optimizer.")}
    dcp.load(dict(weights), storage_reader=JsonMetadataReader(path))
    engine.state_was_loaded(0)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint by Hugging Face name, whole, in this process alone."""
    weights = {n: torch.empty(shape) for n, shape in stored_shapes(path).items() if not n.startswith("optimizer.")}
    read_alone(path, weights)
    return weights


def read_state(path: Path) -> TrainState:
    """The position that a checkpoint was saved at."""
    return TrainState(**json.loads((path / STATE).read_text())["state"])


def read_model(path: Path) -> ModelConfig:
    """The shape of the model that a checkpoint holds."""
    return ModelConfig.model_validate(json.loads((path / STATE).read_text())["model"])


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under `folder`, newest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    whole = [path for path in found if (path / METADATA).is_file() and (path / STATE).is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def set_aside(run_dir: Path) -> None:
    """Rename what an earlier run left in `run_dir`: a run that starts over neither mixes with it nor drops it."""
    names = ("checkpoints", "metrics.jsonl")
    free = next(n for n in count(1) if not any((run_dir / f"{name}.{n}").exists() for name in names))
    for name in names:
        if (run_dir / name).exists():
            (run_dir / name).rename(run_dir / f"{name}.{free}")


def pick_start(config: RunConfig, data: DataIdentity) -> Start:
    """Where the run begins. UserError where `checkpoint.resume` forbids it or a checkpoint is of something else."""
    settings, folder = config.checkpoint, Path(config.run.dir) / "checkpoints"
    found = complete_checkpoints(folder) if settings.resume != "never" else []
    if found:
        _check_same_model(found[0], config.model, "run.dir")
        _check_same_data(found[0], data)
        return Start(resume=found[0])
    if settings.resume == "must":
        raise UserError(f"checkpoint.resume=must, but {folder} holds no checkpoint; use checkpoint.resume=auto")
    if settings.init_from is None:
        return Start()
    weights = Path(settings.init_from)
    if folder.resolve() in weights.resolve().parents:
        raise UserError(f"checkpoint.init_from={weights} is a checkpoint of run.dir itself; use another run.dir")
    if weights not in complete_checkpoints(weights.parent):
        near = complete_checkpoints(weights / "checkpoints") or complete_checkpoints(weights.parent)
        fix = f"checkpoint.init_from={near[0]}" if near else "a folder such as runs/NAME/checkpoints/step_00001000"
        raise UserError(f"checkpoint.init_from={weights} is not a complete checkpoint; use {fix}")
    _check_same_model(weights, config.model, "checkpoint.init_from")
    return Start(weights=weights)


def _check_same_model(path: Path, model: ModelConfig, named_by: str) -> None:
    """UserError when the checkpoint, which the key `named_by` leads to, is of another model than the run."""
    saved, wanted = _resolved(read_model(path)), _resolved(model)
    for key, value in wanted.items():
        if saved[key] != value:
            theirs, ours = json.dumps(saved[key]), json.dumps(value)
            raise UserError(
                f"model.{key}={ours} differs from {theirs} in the checkpoint {path}; "
                f"use model.{key}={theirs}, or another {named_by}"
            )


def _resolved(model: ModelConfig) -> dict[str, Any]:
    """What makes weights fit: every key but those that drew them, with what null stands for."""
    tree = model.model_dump(mode="json", exclude={"init", "initializer_range"})
    return tree | {"num_key_value_heads": model.kv_heads, "head_dim": model.head_size}


def _check_same_data(path: Path, data: DataIdentity) -> None:
    """UserError when a position in the checkpoint's data would be another position in the run's."""
    saved = DataIdentity(**json.loads((path / STATE).read_text())["data"])
    if saved.seed != data.seed:
        raise UserError(
            f"train.seed={data.seed} differs from {saved.seed} in the checkpoint {path}, so its position in the data "
            f"would point elsewhere; use train.seed={saved.seed}, or another run.dir with checkpoint.init_from={path}"
        )
    if saved.fingerprint != data.fingerprint:
        raise UserError(
            f"the data of the run (data.path, data.sequence_length or the split) is not that of the checkpoint {path}; "
            f"use the same data, or another run.dir with checkpoint.init_from={path}"
        )


def _drop_old(folder: Path, keep: int) -> None:
    found = complete_checkpoints(folder)
    losses = {path: read_state(path).validation_loss for path in found}
    evaluated = {path: loss for path, loss in losses.items() if loss is not None}
    best = min(evaluated, key=lambda path: evaluated[path], default=None)
    if best is not None:
        _replace_text(folder / BEST, best.name)
    for old in found[keep:]:
        if old != best:
            shutil.rmtree(old, ignore_errors=True)


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
