"""What a run takes from checkpoints: where it starts, and the state it starts with."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megallama.checkpoint.format import (
    LATEST,
    MANIFEST,
    STATE,
    TENSORS,
    TornCheckpointError,
    complete_checkpoints,
    damaged_files,
    named_checkpoints,
    read_manifest,
    step_of,
    why_torn,
)
from megallama.checkpoint.health import candidates
from megallama.checkpoint.logical import logical_state
from megallama.checkpoint.reading.foreign import check_foreign, fill, wrong_foreign_numbers
from megallama.checkpoint.reading.inspect import inspect, promised, wrong_numbers
from megallama.checkpoint.reading.rollback import asked_step, find, last_return
from megallama.checkpoint.reading.same_run import Identify, check_same_model, check_same_run
from megallama.checkpoint.reading.storage import ShardReader
from megallama.checkpoint.state import Saved, TrainState, read_saved
from megallama.checkpoint.tensors import Stored, is_average, is_weight
from megallama.config.schema import ModelConfig, RunConfig
from megallama.errors import SharedError, UserError, alike
from megallama.formats.folder import program_of
from megallama.layout.check import check_batching
from megallama.model.stages import ModelStages
from megallama.parallel.mesh import ParallelMesh
from megallama.parallel.plain import from_first, of_all
from megallama.run_dir.events import METRICS
from megallama.run_dir.trackers import TENSORBOARD

if TYPE_CHECKING:
    from megallama.train.engine import Engine


@dataclass(frozen=True)
class Start:
    """Where a run begins: a checkpoint to continue, else weights to begin from, else neither."""

    resume: Path | None = None
    weights: Path | None = None
    back: bool = False
    """`checkpoint.resume` names the checkpoint: no other will do, and newer ones are undone."""
    notices: tuple[str, ...] = ()
    """What else there is to say of it."""


def load(path: Path, engine: Engine, model: ModelStages) -> TrainState:
    """Overwrite weights, moments, average and position with those of `path`; every rank must call it.

    Moments that were not saved, of weights frozen until then, stay as they are: zero in a new engine. An average that
    was not begins with the weights, and so does one of another kind.
    """
    saved, reader = read_saved(path), ShardReader(path)
    wanted = logical_state(engine.fragments(), model.shard_slices)
    stored = {name: tensor for name, tensor in wanted.items() if name in reader.names}
    dcp.load({name: tensor for name, tensor in stored.items() if not is_average(name)}, storage_reader=reader)
    engine.state_was_loaded(saved.state.updates)
    if has_average(saved, engine):
        assert engine.average is not None
        dcp.load({name: tensor for name, tensor in stored.items() if is_average(name)}, storage_reader=reader)
        engine.average.what = saved.average
    return saved.state


def has_average(saved: Saved, engine: Engine) -> bool:
    """Whether a checkpoint that says `saved` has an average that the engine goes on with."""
    return engine.average is not None and saved.average is not None and saved.average.kind == engine.average.kind


def load_initial_weights(path: Path, engine: Engine, model: ModelStages) -> None:
    """Overwrite the weights alone with those of `path`: a new run from old weights. Every rank must call it.

    `path` is a checkpoint, or the folder of another program.
    """
    state = logical_state(engine.fragments(), model.shard_slices)
    weights = {name: tensor for name, tensor in state.items() if is_weight(name)}
    if program_of(path) is not None:
        fill(weights, path)
    else:
        dcp.load(dict(weights), storage_reader=ShardReader(path))
    engine.state_was_loaded(0)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint by Hugging Face name, in this process alone. UserError if it is damaged."""
    if reasons := inspect(path):
        raise UserError(f"the checkpoint {path} is damaged ({'; '.join(reasons)}); use another")
    stored = promised(path)
    return {name: torch.from_numpy(stored.read(name)) for name in stored.shapes if is_weight(name)}


def put_aside(run_dir: Path) -> None:
    """Rename what an earlier run left in `run_dir`: a run that starts over neither mixes with it nor drops it."""
    names = ("checkpoints", METRICS, TENSORBOARD)
    free = next(n for n in count(1) if not any((run_dir / f"{name}.{n}").exists() for name in names))
    for name in names:
        if (run_dir / name).exists():
            (run_dir / name).rename(run_dir / f"{name}.{free}")


def pick_start(config: RunConfig, identify: Identify) -> Start:
    """Where the run begins, by what folders and manifests say; `agree` and `confirm` read the files.

    UserError where `checkpoint.resume` forbids it, a checkpoint is of something else, or there were checkpoints and
    none is whole.
    """
    settings, folder = config.checkpoint, Path(config.run.dir) / "checkpoints"
    if settings.resume != "never":
        found = [path for path in candidates(folder) if why_torn(path) is None]
        start = _continue(config, folder, found[0]) if found else Start()
        # One whose state is damaged does not say what it is of. `confirm` passes it over.
        tried = [start.resume] if start.back and start.resume is not None else found
        known = next((path for path in tried if not _senseless(path)), None)
        if known is not None:
            check_same_run(known, config, identify)
        if found:
            return start
        if torn := named_checkpoints(folder):
            _refuse_to_start_over(folder, [f"{path.name}: {why_torn(path)}" for path in torn])
        if (folder / LATEST).exists():
            named = (folder / LATEST).read_text(errors="replace")
            _refuse_to_start_over(folder, [f"{LATEST} names {named!r}, which is not there"])
    if settings.resume not in ("auto", "never"):
        raise UserError(
            f"checkpoint.resume={settings.resume}, but {folder} holds no checkpoint; use checkpoint.resume=auto"
        )
    if settings.init_from is None:
        return Start()
    weights = Path(settings.init_from)
    _refuse_own_weights(weights, folder)
    if program_of(weights) is not None:
        check_foreign(weights, config.model)
        return Start(weights=weights)
    if why_torn(weights) is not None:
        near = complete_checkpoints(weights / "checkpoints") or complete_checkpoints(weights.parent)
        fix = (
            f"checkpoint.init_from={near[0]}"
            if near
            else "one as runs/NAME/checkpoints/step_00001000, or a model's folder"
        )
        raise UserError(f"checkpoint.init_from={weights} is not a complete checkpoint; use {fix}")
    _refuse_damaged_weights(weights, _senseless(weights))
    check_same_model(weights, config.model, "checkpoint.init_from")
    return Start(weights=weights)


def _continue(config: RunConfig, folder: Path, newest: Path) -> Start:
    """Continue the `newest` checkpoint, or that to which `checkpoint.resume` goes back. UserError if it is not there.

    It goes back once: a job that is started again with the same words must not lose what it has done meanwhile.
    """
    resume, init_from, notices = config.checkpoint.resume, config.checkpoint.init_from, list[str]()
    if init_from is not None:
        _refuse_own_weights(Path(init_from), folder)
        notices.append(f"checkpoint.init_from={init_from} was for the beginning of this run, which goes on now")
    if resume in ("auto", "must"):
        return Start(resume=newest, notices=tuple(notices))
    step = asked_step(resume)
    if step is not None and step == last_return(folder) and step_of(newest) >= step:
        if step_of(newest) > step:
            again = f"`megallama checkpoint rollback {shlex.quote(config.run.dir)} {step}` does it again"
            notices.append(f"checkpoint.resume={resume} went back at an earlier start, and this one continues; {again}")
        return Start(resume=newest, notices=tuple(notices))
    try:
        path = find(folder, resume)
    except UserError as error:
        raise UserError(f"checkpoint.resume={resume}: {error}") from None
    if (reason := why_torn(path)) is not None:
        raise UserError(f"checkpoint.resume={resume}: {path} is not whole ({reason}); use another step")
    return Start(resume=path, back=True, notices=tuple(notices))


def _refuse_own_weights(weights: Path, folder: Path) -> None:
    """UserError where `checkpoint.init_from` leads into the checkpoints of the run itself."""
    if folder.resolve() in weights.resolve().parents:
        step = asked_step(weights.resolve().name)
        back = f"checkpoint.resume={step} to go back to it" if step else "none of its own"
        raise UserError(
            f"checkpoint.init_from={weights} is a checkpoint of run.dir itself; use another run.dir to begin anew with "
            f"its weights, or {back}"
        )


def agree(pick: Callable[[], Start], mesh: ParallelMesh) -> Start:
    """What `pick` returns on rank 0, or its UserError; every rank must call it.

    Rank 0's view counts: another node may still see the folder of a moment ago.
    """
    said: dict[str, Any] = {}
    if mesh.rank == 0:
        try:
            start = pick()
            paths = {"resume": start.resume, "weights": start.weights}
            said = {name: None if path is None else str(path) for name, path in paths.items()}
            said |= {"back": start.back, "notices": start.notices}
        except UserError as error:
            said = {"refusal": str(error)}
    said = from_first(said, mesh.world.group, mesh.device)
    if "refusal" in said:
        raise SharedError(said["refusal"])
    resume, weights = (None if said[name] is None else Path(said[name]) for name in ("resume", "weights"))
    return Start(resume, weights, said["back"], tuple(said["notices"]))


@alike()
def check_weights(start: Start, model: ModelConfig, mesh: ParallelMesh) -> None:
    """Hold every byte of weights to begin from against its hash. UserError if they are damaged, or not alike on all.

    Those of another program have no hash, and must be finite. Ranks share the reading: every rank must call it.
    """
    if start.weights is None:
        return
    copies = of_all(_copy_of(start.weights), mesh.world.group, mesh.device)
    if other := next((rank for rank, copy in enumerate(copies) if copy != copies[0]), None):
        raise UserError(
            f"checkpoint.init_from={start.weights} is not for rank {other} what it is for rank 0; give all nodes the "
            "same copy"
        )
    if program_of(start.weights) is None:
        _refuse_damaged_weights(start.weights, damage(start.weights, mesh))
    else:
        mine = wrong_foreign_numbers(start.weights, model, mesh.rank, mesh.world.size)
        _refuse_damaged_weights(start.weights, _all_of(mine, mesh))


def _copy_of(weights: Path) -> str:
    """SHA-256 of what tells copies of two contents apart: a checkpoint's manifest, which has the hash of each file.

    Else, of the files of weights, their names and sizes, and pieces from all over them.
    """
    if program_of(weights) is None:
        return hashlib.sha256((weights / MANIFEST).read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(path for path in weights.rglob("*") if path.suffix in _OF_WEIGHTS):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"/{path.relative_to(weights)}/{size}/".encode())
            for piece in range(_PIECES):
                file.seek(size * piece // _PIECES)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


_OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
_PIECES, _PIECE = 64, 4096


@alike()
def confirm(start: Start, config: RunConfig, identify: Identify, mesh: ParallelMesh) -> tuple[Start, dict[Path, str]]:
    """Where the run begins after all that it reads was looked at, and what is passed over and why.

    Every byte is held against its hash, and what the files say against what they promise. Ranks share the reading, and
    rename nothing. UserError if there were checkpoints and none is sound, or the first sound one is of something else,
    or in a stage of train.batch_ramp that does not fit the ranks. Every rank must call it.
    """
    if start.resume is None:
        return start, {}
    folder = start.resume.parent
    damaged: dict[Path, str] = {}
    named = [start.resume] if start.back else candidates(folder)
    for path in map(Path, from_first([str(path) for path in named], mesh.world.group, mesh.device)):
        reasons = damage(path, mesh)
        if not reasons:
            check_same_run(path, config, identify)
            # What was checked before is how the newest goes on, and this one may be older.
            check_batching(config, mesh.world.size, read_saved(path).state_at(config.data.sequence_length).seen)
            return replace(start, resume=path), damaged
        damaged[path] = "; ".join(reasons)
    if start.back:
        raise UserError(f"checkpoint.resume names {start.resume}, which is damaged ({'; '.join(reasons)}); use another")
    _refuse_to_start_over(folder, [f"{path.name}: {why}" for path, why in damaged.items()])


def _senseless(path: Path) -> list[str]:
    """What is wrong with what `path`, whose manifest is sound, says of itself."""
    return damaged_files(path, read_manifest(path), [STATE, TENSORS]) or _broken(path, promised)


def damage(path: Path, mesh: ParallelMesh) -> list[str]:
    """What is wrong with the files of `path`, else with what they say, else with the numbers; alike on every rank."""
    stored: list[Stored] = []
    try:
        manifest = read_manifest(path)
        names = sorted(manifest.files)[mesh.rank :: mesh.world.size]
        mine = damaged_files(path, manifest, names)
    except TornCheckpointError as error:
        mine = [str(error)]
    return (
        _all_of(mine, mesh)
        or _all_of(_broken(path, lambda path: stored.append(promised(path))), mesh)
        or _all_of(wrong_numbers(stored[0], names), mesh)
    )


def _all_of(mine: list[str], mesh: ParallelMesh) -> list[str]:
    every = of_all(mine, mesh.world.group, mesh.device)
    return sorted({reason for reasons in every for reason in reasons})


def _broken(path: Path, read: Callable[[Path], object]) -> list[str]:
    """Which promise the sound files of `path` break, as `read` tells."""
    try:
        read(path)
    except TornCheckpointError as error:
        return [str(error)]
    return []


def _refuse_damaged_weights(path: Path, reasons: list[str]) -> None:
    if reasons:
        raise UserError(f"checkpoint.init_from={path} is damaged ({reasons[0]}); use another checkpoint")


def _refuse_to_start_over(folder: Path, reasons: list[str]) -> NoReturn:
    raise UserError(
        f"{folder} has held checkpoints and none is whole now ({'; '.join(reasons)}); put one back, or start over with "
        "checkpoint.resume=never, which deletes nothing"
    )
