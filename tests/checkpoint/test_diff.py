"""Two checkpoints compared, tensor by tensor."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.checkpoint.commands import difference
from megallama.checkpoint.commands.difference import compare, differing_fields, tensor_differences
from megallama.checkpoint.format import (
    STATE,
    TENSORS,
    read_document,
)
from megallama.checkpoint.tensors import Stored
from tests.checkpoint.damaging import CHECKPOINT, EMBEDDING, edit, put


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(CHECKPOINT, tmp_path / "checkpoints" / CHECKPOINT.name)


def test_a_checkpoint_is_equal_to_itself_to_the_bit(checkpoint: Path) -> None:
    put(float("nan"))(checkpoint)
    copy = shutil.copytree(checkpoint, checkpoint.with_name("step_00000004"))
    found = list(tensor_differences(Stored(checkpoint), Stored(copy), lambda _: None))
    assert len(found) == 90
    assert all(tensor.equal for tensor in found)
    assert differing_fields(read_document(checkpoint), read_document(copy)) == []


@pytest.mark.parametrize("piece", [1 << 22, 100])
def test_differences_of_a_tensor_are_its_largest_and_that_of_its_norm(
    piece: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(difference, "_PIECE", piece)
    put(*[3.0] * 2048, chunk=0)(checkpoint)
    put(3.0, -4.0)(checkpoint)
    found = list(tensor_differences(Stored(CHECKPOINT), Stored(checkpoint), lambda _: None))
    (tensor,) = (tensor for tensor in found if not tensor.equal)
    a, b = (Stored(path).read(EMBEDDING).astype(np.float64) for path in (CHECKPOINT, checkpoint))
    assert (tensor.name, tensor.why) == (EMBEDDING, "")
    assert tensor.largest == np.abs(a - b).max() == pytest.approx(4.0, abs=0.2)
    assert tensor.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "largest", "relative"),
    [
        ([0.0] * 8, [-0.0] * 8, 0.0, 0.0),
        ([0.0] * 8, [2.0] * 8, 2.0, math.inf),
        ([1.0] * 8, [math.nan] * 8, math.nan, math.nan),
        ([math.inf] * 8, [math.inf, 1.0] * 4, math.nan, math.nan),
    ],
)
def test_differences_at_the_edge_of_arithmetic(a: list[float], b: list[float], largest: float, relative: float) -> None:
    found = compare("x", np.array(a, np.float32), np.array(b, np.float32))
    assert not found.equal
    assert (found.largest, found.relative) == pytest.approx((largest, relative), nan_ok=True)


def test_tensors_that_cannot_be_compared_are_named(checkpoint: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        tensors = content["tensors"]
        tensors["lm_head.bias"] = tensors.pop("model.norm.weight")
        tensors[EMBEDDING] |= {"shape": [256, 8], "chunks": tensors[EMBEDDING]["chunks"][:1]}

    edit(checkpoint / TENSORS, change)
    edit(checkpoint / STATE, lambda content: (content["state"].update(step=5), content.update(more=1)))
    found = {t.name: t.why for t in tensor_differences(Stored(CHECKPOINT), Stored(checkpoint), lambda _: None) if t.why}
    assert found == {
        EMBEDDING: "[257, 8] in A, [256, 8] in B",
        "model.norm.weight": "only in A",
        "lm_head.bias": "only in B",
    }
    fields = differing_fields(read_document(CHECKPOINT), read_document(checkpoint))
    assert [(field.key, field.a, field.b) for field in fields] == [("state.step", 3, 5), ("more", "nothing", 1)]
