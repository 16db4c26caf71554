"""What a model keeps and sends, counted while it runs. Needs torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = {
    "c10d.allreduce_.default": "all_reduce",
    "c10d._allgather_base_.default": "all_gather",
    "c10d._reduce_scatter_base_.default": "reduce_scatter",
}
"""torch's names of those that a model issues."""


class KeptForBackward:
    """Bytes that autograd keeps beside the parameters; operations that keep views of one tensor share its memory."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self._known = {parameter.untyped_storage()._cdata for parameter in parameters}
        # By address, and held: an address that is free is given out again.
        self._kept: dict[int, torch.UntypedStorage] = {}

    @property
    def size(self) -> int:
        """The bytes so far."""
        return sum(storage.nbytes() for place, storage in self._kept.items() if place not in self._known)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, what operations save is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = storage
        return tensor


class Issued(TorchDispatchMode):
    """Collectives by kind: their number, and the bytes of their whole messages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number, self.size = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = COLLECTIVES.get(str(func))
        if kind is not None:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.number[kind] += 1
            self.size[kind] += max(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))
