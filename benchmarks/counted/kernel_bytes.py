"""Bytes and FLOPs of each kernel that a program launches, counted as it runs, on tensors without memory as well."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megallama.parallel.issued import COLLECTIVES

FREE = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "set_"),
    "wait_tensor",
}
"""Operators without a kernel whose schema does not say so, as a view's does."""
OVERWRITTEN = {"copy_", "zero_", "fill_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_"}
"""Write their first argument without reading it."""
PICKING = {"embedding", "gather", "index", "index_select"}
"""Read as much of their largest argument as they write."""
SPREADING = {"scatter_add_", "index_add_", "index_put_", "scatter_"}
"""Read and write as much of their first argument as they are given for it."""
ORDER = {"lt", "gt", "le", "ge"}
FUNCTIONAL = {
    "_c10d_functional.all_reduce": "all_reduce",
    "_c10d_functional.all_gather_into_tensor": "all_gather",
    "_c10d_functional.reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional.all_to_all_single": "all_to_all",
}
"""The collectives of a compiled graph, by torch's names."""
Flops: TypeAlias = Callable[..., float]


@dataclass
class Work:
    """What some kernels do."""

    bytes: float = 0.0
    flops: float = 0.0
    kernels: Counter[str] = field(default_factory=Counter)
    """Bytes by name."""
    launches: int = 0

    def add(self, name: str, moved: float, flops: float = 0.0) -> None:
        """One more kernel."""
        self.bytes += moved
        self.flops += flops
        self.kernels[name] += int(moved)
        self.launches += 1


class KernelBytes(TorchDispatchMode):
    """Work by group: `matmul`, `attention`, else that of the part of the program in which a kernel is launched.

    Each kernel reads what it is given and writes what it makes, once; a view costs nothing, what is written in place
    counts as both. A kernel of backward belongs to the part whose forward made its node of autograd; those that fill
    and follow `grad` belong to `summed`. Collectives of more than one rank are counted apart, by
    kind: their number, and the bytes of their whole messages.
    """

    def __init__(self, summed: str = "sums") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.groups: dict[str, Work] = {}
        self.number, self.size = Counter[str](), Counter[str]()
        self._summed, self._parts = summed, ["other"]
        self._ranges: list[tuple[int, int, str]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile works inside; its graphs are counted by those who run them."""
        return True

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, kernels are of this part, and later those of its backward."""
        self._parts.append(name)
        began = torch._C._autograd._get_sequence_nr()
        try:
            yield
        finally:
            self._parts.pop()
            self._ranges.append((began, torch._C._autograd._get_sequence_nr(), name))

    @property
    def here(self) -> str:
        """The part that runs now."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._parts[-1]
        if node.name().endswith("AccumulateGrad"):
            return self._summed
        made = node._sequence_nr()
        # What is within another part has ended before it.
        return next((name for began, ended, name in self._ranges if began <= made < ended), self._parts[-1])

    def add(self, group: str, name: str, moved: float, flops: float = 0.0) -> None:
        """Count one kernel."""
        self.groups.setdefault(group, Work()).add(name, moved, flops)

    def talk(self, kind: str, size: int) -> None:
        """Count one collective."""
        self.number[kind] += 1
        self.size[kind] += size

    def clear(self) -> None:
        """Forget what was counted."""
        self.groups, self._ranges = {}, []
        self.number, self.size = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return _answer(args[0])
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype == torch.bool and not result.dim():
            result.of_order = func._overloadpacket.__name__ in ORDER  # type: ignore[attr-defined]
        kind = collective(func)
        if kind is not None:
            if _ranks(args) > 1:
                self.talk(kind, max(tensor.nbytes for tensor in _tensors((args, kwargs, result))))
        elif (moved := moved_bytes(func, args, kwargs, result)) > 0:
            self.add(kind_of(func) or self.here, str(func), moved, flops_of(func, args, kwargs, result))
        return result


def _answer(read: Any) -> float | bool:
    """What the host reads of a tensor without memory: 1, of whole numbers 0; that an order holds, and nothing else.

    So norms are finite, gradients are clipped, and no rank of those that are counted lacks anything.
    """
    return 1.0 if read.is_floating_point() else bool(getattr(read, "of_order", False))


def kind_of(func: Any) -> str | None:
    """`matmul` or `attention`, by the name of an operator; None for others."""
    name = str(func)
    if "attention" in name:
        return "attention"
    return "matmul" if getattr(func, "_overloadpacket", None) in flop_registry else None


def collective(func: Any) -> str | None:
    """Its kind, where `func` is one."""
    return COLLECTIVES.get(str(func), FUNCTIONAL.get(str(func).rpartition(".")[0].rstrip("_")))


def _ranks(args: Any) -> int:
    """Of the process group that a collective is given."""
    groups = (arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
    return next((ProcessGroup.unbox(group).size() for group in groups), 2)


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Of those that have a formula, torch's own or one registered beside it."""
    formula: Flops | None = flop_registry.get(getattr(func, "_overloadpacket", None))
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=result))


def moved_bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that the kernel of an operator reads and writes, each tensor once."""
    schema, (space, _, name) = func._schema, func._schema.name.partition("::")
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    is_view = not written and any(r.alias_info is not None for r in schema.returns)
    if space == "prim" or name in FREE or is_view:
        return 0
    given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
    if name == "_fused_adamw_" and given.get("grad_scale") is None:  # its schema has gradients written in any case
        written = [a for a in written if a.name != "grads"]
    into = _tensors([given.get(a.name) for a in written])
    made = [] if written else _tensors(result)
    if name.startswith("new_") or name.endswith("_like"):
        return size_of(made)
    if name in PICKING:
        return size_of(_tensors([given.get("indices", given.get("index"))])) + 2 * size_of(made)
    if name in SPREADING:
        return size_of(_tensors([v for key, v in given.items() if key != "self"])) + 2 * size_of(
            _tensors([given.get("src", given.get("source", given.get("values")))])
        )
    unread = written[:1] if name in OVERWRITTEN else [a for a in written if a.kwarg_only]
    read = _tensors([v for key, v in given.items() if key not in {a.name for a in unread}])
    return size_of(read) + size_of(into) + size_of(made) + _more(name, made, given)


def _more(name: str, made: list[Tensor], given: dict[str, Any]) -> int:
    """What operators that launch two kernels move beside their arguments."""
    if name in ("slice_backward", "select_backward"):  # zeros, then a copy into a part of them
        return size_of(_tensors(given["grad_output"]))
    if name == "masked_fill":  # a copy, then in place
        return 2 * size_of(made)
    return 0


def size_of(tensors: list[Tensor]) -> int:
    """Bytes of these, each element of memory once."""
    found = {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t.itemsize
        * math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)
        for t in tensors
    }
    return sum(found.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
