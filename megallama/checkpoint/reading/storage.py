"""The tensors of a checkpoint read in part, by many ranks at any layout, through `torch.distributed.checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from megallama.checkpoint.tensors import Array, Stored


class ShardReader(StorageReader):
    """Gives `torch.distributed.checkpoint` what each rank asks for, in whatever parts it was stored."""

    def __init__(self, path: Path) -> None:
        self._stored = Stored(path)

    @property
    def names(self) -> Set[str]:
        """All that is stored."""
        return self._stored.shapes.keys()

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
