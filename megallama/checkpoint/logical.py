"""Flat fragments of local parameters seen as boxes of logical tensors, which any layout can read.

ZeRO cuts optimizer state into flat ranges. A flat range of a row-major matrix is at most three rectangles: the rest of
a row, whole rows, the beginning of a row; that of a tensor of n dimensions is at most 2 n - 1 boxes. Given to
`torch.distributed.checkpoint` as chunks of the logical tensor, they are stored and found again by place, whoever wrote
them and whoever reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megallama.checkpoint.tensors import average_name, moment_name
from megallama.parallel.shards import ShardSlice, boxes

if TYPE_CHECKING:
    from megallama.train.engine import Fragment


class LogicalTensor(torch.Tensor):
    """The chunks that this rank holds of one logical fp32 tensor, in the terms of `torch.distributed.checkpoint`.

    Without storage of its own: reading a checkpoint writes through to the chunks.
    """

    chunks: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls, shape: Sequence[int]) -> LogicalTensor:
        made: LogicalTensor = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=torch.float32)
        made.chunks = {}
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch declares a function here
        raise AssertionError(f"a LogicalTensor only goes in and out of checkpoints, it cannot {func}")

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=torch.float32)
        return [
            WriteItem(
                index=MetadataIndex(name, offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offset, sizes=chunk.shape),
                    properties=properties,
                    size=self.shape,
                ),
            )
            for offset, chunk in self.chunks.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=offset, sizes=chunk.shape) for offset, chunk in self.chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.chunks[index.offset]


def logical_state(fragments: Iterable[Fragment], held: Mapping[str, Sequence[ShardSlice]]) -> dict[str, LogicalTensor]:
    """Master weights, moments and averages of this rank, by logical name; chunks are views, not copies.

    Those of frozen weights have the type of training; what reads and writes them casts.
    """
    state: dict[str, LogicalTensor] = {}

    def add(name: str, piece: ShardSlice, offset: torch.Size, chunk: Tensor) -> None:
        state.setdefault(name, LogicalTensor(piece.shape)).chunks[offset] = chunk

    for fragment in fragments:
        for piece in held[fragment.parameter]:
            for offset, size, flat in boxes(piece, fragment.start, fragment.start + fragment.master.numel()):
                here = slice(flat - fragment.start, flat - fragment.start + size.numel())
                add(piece.name, piece, offset, fragment.master[here].view(size))
                for moment, flat_moment in fragment.moments.items():
                    add(moment_name(moment, piece.name), piece, offset, flat_moment[here].view(size))
                if fragment.average is not None:
                    add(average_name(piece.name), piece, offset, fragment.average[here].view(size))
    return state
