"""The tensors of a checkpoint: plain fp32 numbers in files, at the places that tensors.json names. Nothing to unpickle.

Read whole and alone (`Stored`), or in part, by many ranks at any layout (`ShardReader`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from megallama.checkpoint.format import TENSORS, TornCheckpointError, read_manifest

Array = NDArray[np.float32]


class Stored:
    """The tensors of the checkpoint at `path` by name. TornCheckpointError if it is not a whole one."""

    def __init__(self, path: Path) -> None:
        self._path, self._manifest = path, read_manifest(path)
        self._tensors: dict[str, Any] = json.loads((path / TENSORS).read_text())["tensors"]
        self._files: dict[str, Array] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor."""
        return {name: tuple(tensor["shape"]) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Array:
        """One tensor, whole."""
        whole = np.full(self.shapes[name], np.nan, dtype=np.float32)
        for offset, chunk in self.chunks(name):
            whole[tuple(slice(o, o + n) for o, n in zip(offset, chunk.shape, strict=True))] = chunk
        return whole

    def places(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Where each part of one tensor begins, and its shape."""
        return [(tuple(chunk["offset"]), tuple(chunk["shape"])) for chunk in self._tensors[name]["chunks"]]

    def chunks(self, name: str) -> Iterator[tuple[tuple[int, ...], Array]]:
        """The parts of one tensor: where each begins, and its numbers, mapped from the file."""
        for chunk in self._tensors[name]["chunks"]:
            start, shape = chunk["start"] // 4, tuple(chunk["shape"])
            flat = self._map(chunk["file"])[start : start + math.prod(shape)]
            if flat.size != math.prod(shape):
                raise TornCheckpointError(f"{TENSORS} names a place beyond the end of {chunk['file']}")
            yield tuple(chunk["offset"]), flat.reshape(shape)

    def _map(self, file: str) -> Array:
        if file not in self._manifest.files:
            raise TornCheckpointError(f"{TENSORS} names the file {file!r}, which is not in the manifest")
        if file not in self._files:
            # Private and writable: torch takes no memory that is read-only, and nothing reaches the file.
            self._files[file] = np.memmap(self._path / file, dtype=np.float32, mode="c")
        return self._files[file]


class ShardReader(StorageReader):
    """Gives `torch.distributed.checkpoint` what each rank asks for, in whatever parts it was stored."""

    def __init__(self, path: Path) -> None:
        self._stored = Stored(path)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        described: dict[str, Any] = {}
        for name, shape in self._stored.shapes.items():
            places = self._stored.places(name)
            chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(extent)) for offset, extent in places]
            properties = TensorProperties(dtype=torch.float32)
            described[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
        return Metadata(described)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        found: dict[MetadataIndex, Array] = {}
        for name in {item.storage_index.fqn for item in plan.items}:
            for offset, chunk in self._stored.chunks(name):
                found[MetadataIndex(name, offset)] = chunk
        for item in plan.items:
            here = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item)
            target.copy_(torch.from_numpy(found[item.storage_index][here]))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
