"""The collectives that a piece of code issues, counted as it runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = {
    "c10d.allreduce_.default": "all_reduce",
    "_c10d_functional.all_reduce.default": "all_reduce",
    "_c10d_functional.all_gather_into_tensor.default": "all_gather",
    "_c10d_functional.reduce_scatter_tensor.default": "reduce_scatter",
    "c10d._allgather_base_.default": "all_gather",
    "c10d._reduce_scatter_base_.default": "reduce_scatter",
    "c10d.alltoall_base_.default": "all_to_all",
}
"""torch's names of those that a model issues, and ZeRO."""


class Issued(TorchDispatchMode):
    """Collectives by kind: their number, and the bytes of their whole messages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number, self.size = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, kind = func(*args, **(kwargs or {})), COLLECTIVES.get(str(func))
        if kind is not None:
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            self.number[kind] += 1
            self.size[kind] += max(tensor.nbytes for tensor in tensors)
        return result
