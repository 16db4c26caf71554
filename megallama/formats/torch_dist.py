"""Torch's distributed checkpoints, of which `.metadata` is a pickle: read without the code that one can hold."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megallama.errors import UserError
from megallama.system.regular_file import open_regular, read_regular

METADATA = ".metadata"
_LARGEST = 1 << 32
"""Bytes that `.metadata` may have: it takes some hundreds for each part that a rank wrote."""
_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},  # of older torch
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    # Megatron keeps every rank's plan of the save, to use it again.
    f"{_DCP}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""What `.metadata` is made of: records, sizes and types. None of them does anything when it is made."""


class TorchDist:
    """The tensors of the distributed checkpoint in `folder`, by key.

    UserError if `.metadata` is damaged or holds anything but the classes that describe tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        metadata = _read_metadata(folder / METADATA)
        described = metadata.state_dict_metadata.items()
        self._tensors = {key: found for key, found in described if isinstance(found, TensorStorageMetadata)}
        self.shapes: Mapping[str, tuple[int, ...]] = {key: tuple(each.size) for key, each in self._tensors.items()}
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def dtype(self, key: str) -> torch.dtype:
        """The type in which a tensor is stored."""
        return self._tensors[key].properties.dtype

    def check(self, keys: Sequence[str]) -> None:
        """UserError for the first of these tensors of which a part is not in the files. Reads sizes of files alone."""
        lengths: dict[str, int] = {}
        for key in keys:
            tensor = self._tensors[key]
            if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
                raise UserError(f"{self._folder / METADATA} does not list all of {key}; copy the checkpoint again")
            for chunk in tensor.chunks:
                place = self._places.get(MetadataIndex(key, chunk.offsets))
                if place is None:
                    raise UserError(f"{self._folder / METADATA} does not say where {key} is; copy the checkpoint again")
                if place.relative_path not in lengths:
                    lengths[place.relative_path] = self._length(place.relative_path, key)
                if place.offset + place.length > lengths[place.relative_path]:
                    raise UserError(
                        f"{self._folder / place.relative_path} ends before a part of {key}; copy the checkpoint again"
                    )

    def read(self, key: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of that size of one tensor, from the parts that hold some of it. UserError if they do not."""
        box = _Box(size, self.dtype(key))
        wanted = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        items = create_read_items_for_chunk_list(key, self._tensors[key], [wanted])
        try:
            self._reader.read_data(LoadPlan(items), box).wait()
        except Exception as error:  # torch.load has no one kind of error for what is damaged
            problem = str(error).partition("\n")[0]
            raise UserError(
                f"{self._folder} holds {key} in a file that is damaged ({problem:.200}); copy the checkpoint again"
            ) from None
        if not box.filled.all():
            raise UserError(f"{self._folder / METADATA} does not list all of {key}; copy the checkpoint again")
        return box.tensor

    def _length(self, name: str, key: str) -> int:
        """Bytes of a file of the folder that holds some of `key`."""
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{self._folder / METADATA} names the file {name}, which is not in its folder")
        try:
            with open_regular(self._folder / name) as file:
                return file.seek(0, io.SEEK_END)
        except OSError as error:
            raise UserError(
                f"{self._folder / name}, which holds {key}, cannot be read ({error.strerror}); complete the folder"
            ) from None


class _Box(DefaultLoadPlanner):
    """Where torch's reader puts the parts of one box of a tensor."""

    def __init__(self, size: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.tensor, self.filled = torch.empty(*size, dtype=dtype), torch.zeros(*size, dtype=torch.bool)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self.transform_tensor(read_item, self.filled).fill_(True)


class _Unpickler(pickle.Unpickler):
    """Of records, sizes and types only; as the documentation of pickle says under "Restricting globals"."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _CLASSES.get(module_name, ()):
            raise _ForeignClassError(f"{module_name}.{global_name}")
        return super().find_class(module_name, global_name)


class _ForeignClassError(Exception):
    """A pickle names something that does not describe tensors."""


def _read_metadata(path: Path) -> Metadata:
    try:
        content = read_regular(path, _LARGEST)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the folder of a whole checkpoint") from None
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
    except _ForeignClassError as error:
        raise UserError(f"{path} holds {error}, which describes no tensor, and is not loaded") from None
    except Exception:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is damaged; copy the checkpoint again") from None
    try:
        _check(metadata)
    except (TypeError, AttributeError):
        raise UserError(f"{path} does not describe tensors and where they are; copy the checkpoint again") from None
    return metadata


def _check(metadata: Metadata) -> None:
    """TypeError or AttributeError unless records are of the kinds that torch writes, and each chunk in its tensor."""
    _expect(metadata, Metadata)
    _expect(metadata.state_dict_metadata, dict)
    for key, tensor in metadata.state_dict_metadata.items():
        _expect(key, str)
        if isinstance(tensor, TensorStorageMetadata):
            _expect(tensor.properties.dtype, torch.dtype)
            _expect(tensor.chunks, list)
            for chunk in tensor.chunks:
                for extents in (chunk.offsets, chunk.sizes, tensor.size):
                    _expect(extents, torch.Size)
                bounds = zip(chunk.offsets, chunk.sizes, tensor.size, strict=False)
                inside = all(offset >= 0 and size > 0 and offset + size <= whole for offset, size, whole in bounds)
                if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.size) or not inside:
                    raise TypeError(key)
    _expect(metadata.storage_data, dict)
    for index, place in metadata.storage_data.items():
        _expect(index, MetadataIndex)
        _expect(place, _StorageInfo)
        _expect(place.relative_path, str)
        _expect(place.offset, int)
        _expect(place.length, int)
        if min(place.offset, place.length) < 0:
            raise TypeError(index.fqn)


def _expect(value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(type(value).__name__)
