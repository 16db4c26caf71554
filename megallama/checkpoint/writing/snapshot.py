"""This rank's part of a checkpoint in memory that another process can read: the image of the file it will be.

`torch.distributed.checkpoint` plans once, when a run starts: it checks that the chunks of all ranks together cover each
logical tensor, and from the plan follows the place of each chunk in the file of its rank. A save is then a copy.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megallama.checkpoint.logical import LogicalTensor
from megallama.checkpoint.tensors import ELEMENT
from megallama.errors import UserError
from megallama.run_dir.limits import too_little


class Snapshot:
    """Shared memory that holds copies of this rank's chunks of `state`, one behind the other.

    Takes as many bytes as this rank writes, for as long as the run lasts; on CUDA they are pinned. UserError, on every
    rank, where the limit of a file's size is below what one of them writes.
    """

    def __init__(self, state: Mapping[str, LogicalTensor], rank: int, group: Any) -> None:
        self.file = f"rank_{rank:05d}.bin"
        """Name of the file whose image this is."""
        plan = _Places(self.file)
        dcp.save(dict(state), storage_writer=plan, process_group=group)
        self.tensors = plan.tensors
        """On rank 0, where every chunk of every tensor is, as tensors.json says it."""
        self.size = ELEMENT * plan.elements
        """Bytes."""
        # Anonymous: gone with the last process that has it, however that one ends; /dev/shm is small in containers.
        self.descriptor = os.memfd_create("megallama-checkpoint")
        largest = torch.tensor(self.size)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)  # which counts for memory like this too
        if limit != resource.RLIM_INFINITY and limit < largest:
            raise UserError(too_little(limit, "f", "bytes in one file", int(largest)))
        os.ftruncate(self.descriptor, max(self.size, 1))
        # Touched now, so that no save waits for the kernel to find and clear the pages.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._memory = mmap.mmap(self.descriptor, max(self.size, 1), flags=flags)
        image = (
            torch.frombuffer(self._memory, dtype=torch.float32, count=plan.elements) if self.size else torch.empty(0)
        )
        self._copies = {index: image[start : start + shape.numel()].view(shape) for index, start, shape in plan.chunks}
        refused = torch.tensor(_pin(image) if plan.on_gpu else 0)
        dist.all_reduce(refused, op=dist.ReduceOp.MAX, group=group)  # rank 0 tells what any node's driver says
        self.notice = _slower(int(refused), int(largest)) if refused else ""
        """Why saves are slower than they could be; empty where they are not."""

    def take(self, state: Mapping[str, LogicalTensor]) -> None:
        """Copy `state`, whose tensors are cut as they were at first."""
        for index, copy in self._copies.items():
            copy.copy_(state[index.fqn].__get_tensor_shard__(index), non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


class _Places(StorageWriter):
    """Writes nothing: gives each chunk its place in the file of its rank."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.elements = 0
        self.chunks: list[tuple[MetadataIndex, int, torch.Size]] = []
        """Which part of which tensor, its first element in the file, its shape."""
        self.on_gpu = False
        """Whether any of them is."""
        self.tensors: dict[str, Any] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for item in plan.items:
            chunk = planner.resolve_data(item)
            assert isinstance(chunk, Tensor)
            place = {"file": self._file, "start": ELEMENT * self.elements}
            results.append(WriteResult(item.index, ELEMENT * chunk.numel(), place))
            self.chunks.append((item.index, self.elements, chunk.shape))
            self.elements, self.on_gpu = self.elements + chunk.numel(), self.on_gpu or chunk.is_cuda
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for rank in results for result in rank}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = [
                {"offset": list(c.offsets), "shape": list(c.sizes), **places[MetadataIndex(name, c.offsets)]}
                for c in tensor.chunks
            ]
            self.tensors[name] = {"shape": list(tensor.size), "chunks": chunks}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _pin(image: Tensor) -> int:
    """Let the GPU copy into `image` at the speed of the bus, beside the processor; CUDA's error where it cannot."""
    if image.numel() == 0:
        return 0
    refused = int(torch.cuda.cudart().cudaHostRegister(image.data_ptr(), image.numel() * image.element_size(), 0))
    if refused:
        with suppress(RuntimeError):  # torch blames the next kernel for what its last call of CUDA said: this one
            torch.zeros(1, device="cuda")
    return refused


def _slower(refused: int, size: int) -> str:
    return (
        f"a driver does not pin the {size / 1e9:.1f} GB of a rank's part of a save (CUDA error {refused}): training "
        "waits longer for each; raise `ulimit -l`, or leave more memory to the host"
    )
