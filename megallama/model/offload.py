"""The inputs of layers in pinned host memory, between a layer's forward and the backward that computes it again.

Copies run on a stream of their own beside computation (arXiv 2002.05645 and Megatron-LM's activation offloading do the
same): out while the next layers run, and back while the backward of the layer above runs. On a CPU the inputs stay
where they are, on the same path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True, eq=False)
class _Input:
    """Of a layer, and which one it is of those that one forward moved."""

    index: int
    held: Tensor


@dataclass(frozen=True)
class _Arriving:
    """An input on its way back."""

    index: int
    tensor: Tensor
    event: torch.cuda.Event | None


class OffloadedInputs:
    """Those of one forward of a stage, in the order of its layers.

    Autograd keeps what hooks return, and with it this: host memory is free as soon as autograd lets go of an input.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device, self._stream = device, stream
        self._inputs: list[ref[_Input]] = []
        self._next: Tensor | None = None
        self._arriving: _Arriving | None = None
        self._last = 0

    @contextmanager
    def of(self, x: Tensor) -> Iterator[None]:
        """Inside, `x` is moved where autograd keeps it; all else that it keeps stays."""
        self._next = x
        with saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._next = None

    def _pack(self, tensor: Tensor) -> Tensor | _Input:
        assert self._next is not None
        # Not is_set_to, which knows no tensors without values.
        if tensor.untyped_storage()._cdata != self._next.untyped_storage()._cdata or tensor.shape != self._next.shape:
            return tensor
        packed = _Input(len(self._inputs), self._out(tensor.detach()))
        self._inputs.append(ref(packed))
        self._last = len(self._inputs)
        return packed

    def _unpack(self, packed: Tensor | _Input) -> Tensor:
        """The input of a layer; that of its neighbour, towards which backward goes, sets out."""
        if isinstance(packed, Tensor):
            return packed
        index, arriving = packed.index, self._arriving
        if arriving is None or arriving.index != index:
            arriving = self._back(packed)
        # The weights' part of a split backward goes the other way.
        following = index + 1 if index > self._last else index - 1
        neighbour = self._inputs[following]() if 0 <= following < len(self._inputs) else None
        self._last, self._arriving = index, None if neighbour is None else self._back(neighbour)
        if arriving.event is not None:
            torch.cuda.current_stream(self._device).wait_event(arriving.event)
        return arriving.tensor

    def _out(self, tensor: Tensor) -> Tensor:
        if self._stream is None:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is free when it is copied
        return host

    def _back(self, packed: _Input) -> _Arriving:
        if self._stream is None:
            return _Arriving(packed.index, packed.held, None)
        tensor = torch.empty_like(packed.held, device=self._device)
        # The memory may be that of something which computation still reads.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            tensor.copy_(packed.held, non_blocking=True)
            event = self._stream.record_event()
        tensor.record_stream(self._stream)
        return _Arriving(packed.index, tensor, event)
