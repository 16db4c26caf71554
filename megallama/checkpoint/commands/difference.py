"""What two checkpoints do not have in common, in what they say of themselves and in their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megallama.checkpoint.tensors import Array, Stored

Document = dict[str, Any]
ABSENT = "nothing"
_PIECE = 1 << 22
"""Elements that are compared at once, in fp64."""


@dataclass(frozen=True)
class FieldDifference:
    """A value of state.json that is another, as `state.step`."""

    key: str
    a: object
    b: object


@dataclass(frozen=True)
class TensorDifference:
    """Two tensors of one name, A and B."""

    name: str
    equal: bool
    """To the bit."""
    largest: float | None = None
    """The largest |A - B| of an element; None where they cannot be compared."""
    relative: float | None = None
    """|A - B| / |A|, norms over the whole tensor in fp64; infinite where A is zero."""
    why: str = ""
    """Why they cannot be compared: there is only one, or their shapes differ."""


def differing_fields(a: Document, b: Document) -> list[FieldDifference]:
    """What two state.json say differently, in the order of the first."""
    left, right = dict(_flat(a)), dict(_flat(b))
    found = [FieldDifference(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in {**left, **right}]
    return [field for field in found if field.a != field.b]


def tensor_differences(a: Stored, b: Stored, report: Callable[[str], None]) -> Iterator[TensorDifference]:
    """Every tensor of either, one of each in memory at a time; `report` is told which."""
    for name in {**a.shapes, **b.shapes}:
        report(name)
        if name not in a.shapes or name not in b.shapes:
            yield TensorDifference(name, False, why=f"only in {'A' if name in a.shapes else 'B'}")
        elif a.shapes[name] != b.shapes[name]:
            yield TensorDifference(name, False, why=f"{list(a.shapes[name])} in A, {list(b.shapes[name])} in B")
        else:
            yield compare(name, a.read(name), b.read(name))


def compare(name: str, a: Array, b: Array) -> TensorDifference:
    """Two tensors of the same shape."""
    if np.array_equal(a.view(np.uint32), b.view(np.uint32)):
        return TensorDifference(name, True, 0.0, 0.0)
    largest, difference, norm = 0.0, 0.0, 0.0
    for start in range(0, a.size, _PIECE):
        before, after = (tensor.reshape(-1)[start : start + _PIECE].astype(np.float64) for tensor in (a, b))
        with np.errstate(invalid="ignore"):  # infinity less infinity
            change = before - after
        largest = float(np.maximum(largest, np.abs(change).max()))  # NaN where there is one, unlike max
        difference, norm = difference + float(change @ change), norm + float(before @ before)
    relative = math.sqrt(difference / norm) if norm else math.inf if difference else 0.0
    return TensorDifference(name, False, largest, relative)


def _flat(tree: Document, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
