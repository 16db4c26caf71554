"""`torch.distributed.checkpoint` on a file system, with its metadata as JSON.

torch pickles the metadata and unpickles whatever it finds; ours is data that cannot run. Tensors are read with
`weights_only=True`.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

METADATA = "metadata.json"


class JsonMetadataWriter(FileSystemWriter):
    """Writes tensors as torch does, and their places into metadata.json."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for rank in results for result in rank}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = []
            for chunk in tensor.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                chunks.append([list(chunk.offsets), list(chunk.sizes), place.relative_path, place.offset, place.length])
            tensors[name] = {"shape": list(tensor.size), "chunks": chunks}
        write_json(Path(self.path) / METADATA, {"dtype": "float32", "tensors": tensors})


class JsonMetadataReader(FileSystemReader):
    """Reads what JsonMetadataWriter wrote."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        tensors = json.loads((Path(self.path) / METADATA).read_text())["tensors"]
        described: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for name, tensor in tensors.items():
            chunks = []
            for offset, size, file, start, length in tensor["chunks"]:
                if Path(file).name != file:
                    raise ValueError(f"{METADATA} of {self.path} names the file {file!r} outside its folder")
                chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
                places[MetadataIndex(name, offset)] = _StorageInfo(file, start, length)
            properties = TensorProperties(dtype=torch.float32)
            described[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
        return Metadata(described, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))


def read_alone(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill whole `tensors` by name from the checkpoint at `path`, in this process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(dict(tensors), storage_reader=JsonMetadataReader(path), no_dist=True)


def stored_shapes(path: Path) -> dict[str, torch.Size]:
    """The shape of every tensor of the checkpoint at `path`."""
    described = JsonMetadataReader(path).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in described.items() if isinstance(tensor, TensorStorageMetadata)}


def write_json(path: Path, value: object) -> None:
    """Write, and reach the disk before returning."""
    with path.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
