"""The contenders of `checkpoint.py`: ways to bring the state of an engine to the disk and back."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from megallama.checkpoint.format import folder_name
from megallama.checkpoint.logical import logical_state
from megallama.checkpoint.reading.store import load
from megallama.checkpoint.state import DataIdentity, TrainState, state_document
from megallama.checkpoint.writing.commit import Retention
from megallama.checkpoint.writing.saver import Saver
from megallama.model.stages import ModelStages
from megallama.parallel.launch import LOOPBACK
from megallama.parallel.mesh import ParallelMesh

if TYPE_CHECKING:
    from megallama.train.engine import Engine, Fragment

STATE = TrainState(step=1, samples=1, updates=1)


@dataclass(frozen=True)
class Contender:
    """Saves the engine's state into an empty folder that exists, and loads it from there; every rank calls all."""

    save: Callable[[Path], object]
    """Returns when training may go on."""
    load: Callable[[Path], object]
    wait: Callable[[], object] = lambda: None
    """Until the save has ended."""
    prepare: Callable[[], object] = lambda: None
    """What a run does once, before it trains."""


def contenders(engine: Engine, model: ModelStages, mesh: ParallelMesh, folder: Path) -> dict[str, Contender]:
    """By name, the one that the others are compared with first."""
    deepspeed = engine._engine
    return {
        "torch.save": torch_save(engine, mesh),
        **of_any_layout(engine, model, mesh, folder),
        "dcp-async": dcp_async(engine, model, mesh, folder),
        "deepspeed": Contender(
            lambda folder: deepspeed.save_checkpoint(str(folder)), lambda folder: deepspeed.load_checkpoint(str(folder))
        ),
    }


def of_any_layout(engine: Engine, model: ModelStages, mesh: ParallelMesh, folder: Path) -> dict[str, Contender]:
    """Those that load what another layout saved."""
    return {"megallama": megallama(engine, model, mesh, folder / "megallama"), "dcp": dcp_plain(engine, model)}


def torch_save(engine: Engine, mesh: ParallelMesh) -> Contender:
    """A file per rank, of the parts of parameters that it owns."""

    def save_file(folder: Path) -> None:
        state = {fragment.parameter: state_of(fragment) for fragment in engine.fragments()}
        # In fp32 the masters of one of several ranks are a view of all weights, which torch.save would write whole.
        if any(partition.untyped_storage().nbytes() > partition.nbytes for partition in engine._partitions):
            state = {name: tensors | {"master": tensors["master"].clone()} for name, tensors in state.items()}
        with (folder / f"rank{mesh.rank}.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def load_file(folder: Path) -> None:
        state = torch.load(folder / f"rank{mesh.rank}.pt", weights_only=True, map_location="cpu")
        for fragment in engine.fragments():
            for name, tensor in state_of(fragment).items():
                tensor.copy_(state[fragment.parameter][name])
        engine.state_was_loaded(STATE.updates)

    return Contender(save_file, load_file)


def megallama(engine: Engine, model: ModelStages, mesh: ParallelMesh, folder: Path) -> Contender:
    """Saves only into `folder`, and loads from any."""
    # As a run does: its memory lies there from the start.
    saver = Saver(folder, engine, model, mesh, Retention(keep=1))
    document = state_document(STATE, 0.0, True, DataIdentity("", 0), model.config, {})
    return Contender(
        lambda _: saver.save(STATE.step, document),
        lambda folder: load(folder / folder_name(STATE.step), engine, model),
        saver.wait,
    )


def dcp_plain(engine: Engine, model: ModelStages) -> Contender:
    """torch's Distributed Checkpoint of whole tensors, of which each rank holds boxes."""

    def load_boxes(folder: Path) -> None:
        dcp.load(dict(logical_state(engine.fragments(), model.shard_slices)), storage_reader=FileSystemReader(folder))
        engine.state_was_loaded(STATE.updates)

    def save_boxes(folder: Path) -> None:
        state = logical_state(engine.fragments(), model.shard_slices)
        dcp.save(dict(state), storage_writer=FileSystemWriter(folder, sync_files=True))

    return Contender(save_boxes, load_boxes)


def dcp_async(engine: Engine, model: ModelStages, mesh: ParallelMesh, folder: Path) -> Contender:
    """The same from a process of torch's, of plain tensors named by place: its stager copies no boxes of a whole.

    The process is started here, by a small save into `folder`.
    """
    on_gpu = mesh.device.type == "cuda"
    stager = DefaultStager(StagingOptions(on_gpu, True, use_async_staging=False, use_non_blocking_copy=on_gpu))
    group = dist.new_group(backend="gloo")

    def save(state: dict[str, Any], folder: Path) -> Future[None]:
        saved = dcp.async_save(
            state,
            storage_writer=FileSystemWriter(folder, sync_files=True),
            process_group=group,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=stager,
        )
        assert isinstance(saved, Future)
        return saved

    def load_chunks(folder: Path) -> None:
        dcp.load(dict(chunks(engine, model)), storage_reader=FileSystemReader(folder))
        engine.state_was_loaded(STATE.updates)

    os.environ.setdefault("MASTER_ADDR", LOOPBACK)  # where the processes of all ranks meet
    multiprocessing.current_process().daemon = False  # such a rank may start none
    with silent_children():
        save({"first": torch.zeros(1)}, folder / "first").result()
    pending: list[Future[None]] = []
    return Contender(
        lambda folder: pending.append(save(dict(chunks(engine, model)), folder)),
        load_chunks,
        lambda: pending.pop().result(),
        # Its memory. DeepSpeed puts new moments in the place of those that it loads, and the stager knows the old ones.
        lambda: stager.stage(dict(chunks(engine, model))),
    )


@contextmanager
def silent_children() -> Iterator[None]:
    """Processes that are started meanwhile have nowhere to write errors to: torch's logs, and complains at its end."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def state_of(fragment: Fragment) -> dict[str, Tensor]:
    """By reference."""
    return {"master": fragment.master, **fragment.moments}


def chunks(engine: Engine, model: ModelStages) -> Iterator[tuple[str, Tensor]]:
    """This rank's state by reference, named by place: without the padding of vocabularies, which no one need keep."""
    for name, tensor in logical_state(engine.fragments(), model.shard_slices).items():
        for offset, chunk in tensor.chunks.items():
            yield f"{name} {tuple(offset)}", chunk
