"""A rank that runs out of memory says in one sentence what took it, and what would take less."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.batching import dp_size
from megallama.parallel.mesh import ParallelMesh
from megallama.plan.memory.ledger import memory_rows
from megallama.plan.search.changes import nearest_change
from megallama.system.whole_file import put

# torch has an exception of its own for its CUDA allocator alone: cublas, nccl and its CPU allocator raise plain ones.
_ON_A_GPU = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ON_A_CPU = ("can't allocate memory", "not enough memory")

_ENTRIES = 100_000
"""Allocations and releases that are kept: those of several steps, in some hundred MB of the host's memory."""


@contextmanager
def memory_explained(config: RunConfig, mesh: ParallelMesh) -> Iterator[None]:
    """Turn an error for want of this rank's memory into a UserError with its largest predicted terms.

    On CUDA it names a snapshot of the memory, which has the history of it if `train.memory_history` asks for that.
    """
    if mesh.device.type == "cuda" and config.train.memory_history:
        # Python's stacks, and of allocations alone: what released memory that is gone is of no interest.
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=_ENTRIES)
    try:
        yield
    except Exception as error:
        if not out_of_memory(error, mesh.device):
            raise
        # The ledger of train.device=auto is that of a GPU.
        train = config.train.model_copy(update={"device": mesh.device.type})
        here = config.model_copy(update={"train": train})
        sentence = explanation(here, mesh.world.size, mesh.rank, mesh.pp.rank)
        snapshot = write_snapshot(Path(config.run.dir), mesh) if mesh.device.type == "cuda" else None
        raise UserError(sentence + (f"; its memory is in {snapshot}" if snapshot else "")) from error


def write_snapshot(run_dir: Path, mesh: ParallelMesh) -> Path | None:
    """Write what the GPU's memory holds, for pytorch.org/memory_viz; None where that fails, for whatever reason."""
    path = run_dir / "memory" / f"rank_{mesh.rank:05d}.pickle"
    try:
        path.parent.mkdir(exist_ok=True)
        put(path, pickle.dumps(torch.cuda.memory._snapshot(mesh.device)))
    except Exception:  # the run ends by another error, which is to be said
        return None
    return path


def out_of_memory(error: BaseException | None, device: torch.device) -> bool:
    """Whether it, or what caused it, is for want of memory of `device`: torch's pipelines wrap what a stage raises.

    The host's memory is another's matter in a run on GPUs, whose terms are not in it.
    """
    while error is not None:
        if device.type == "cuda":
            found = isinstance(error, torch.OutOfMemoryError) or _says(error, _ON_A_GPU)
        else:
            no_room = isinstance(error, OSError) and error.errno == errno.ENOMEM
            found = isinstance(error, MemoryError) or no_room or _says(error, _ON_A_CPU)
        if found:
            return True
        error = error.__cause__
    return False


def explanation(config: RunConfig, world_size: int, rank: int, pipeline_rank: int) -> str:
    """The sentence, for a run that is legal on `world_size` ranks."""
    rows = memory_rows(config, dp_size(config, world_size))[pipeline_rank]
    largest = sorted(rows, key=lambda row: row.size, reverse=True)[:3]
    *first, last = (f"{row.name} {_size(row.size)}" for row in largest)
    terms = f"{', '.join(first)} and {last}"
    change = nearest_change(config, world_size)
    fix = (
        "use a smaller model or more ranks"
        if change is None
        else f"use {change.words}, with which the fullest rank needs {_size(change.size)}"
    )
    total = _size(sum(row.size for row in rows))
    return f"no memory is left on rank {rank}, for which {total} are predicted, most of them {terms}; {fix}"


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
