"""All loaders of row C7 give shuffled windows of the documents, and one that did not would be found out."""

from __future__ import annotations

from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallama.data.indexed import open_indexed

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]
PEERS = {"megatron-core", "litdata"}


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("windows")


def test_every_loader_is_measured_on_the_same_documents(windows: Any) -> None:
    found = import_module("rows.scripts").windows("C7", 1, 2)
    assert found.wrong == []
    lines = {line.contender: line for line in found.lines}
    left_out = {name for name in PEERS if any(note.startswith(f"{name} is left out") for note in found.notes)}
    assert left_out <= {"litdata"}  # `make bench` alone installs it
    assert set(lines) == {f"{name}, {what}" for name in windows.MAKERS.keys() - left_out for what in ("warm", "cold")}
    assert {line.row for line in found.lines} == {"C7"}
    assert lines["memmap, warm"].of_floor == 1.0
    assert 0 < lines["ours, warm"].of_floor < 1, "ours does all that the memmap does"
    assert all(line.ratio > 0 for line in found.lines if not line.contender.startswith("ours"))
    (aim,) = found.aims
    assert (aim.what, aim.found) == ("loader time, of megatron-core's", lines["megatron-core, warm"].ratio)


def test_batches_of_other_work_are_found_out(windows: Any, tmp_path: Path) -> None:
    windows.write_documents(tmp_path / "d", 1_000_000)
    right = list(islice(windows.ours(tmp_path / "d")(), 8))
    assert windows.faults(right) == []
    ids = open_indexed(str(tmp_path / "d")).tokens
    in_order = np.lib.stride_tricks.sliding_window_view(ids, 2049)[: 64 * 2048 : 2048].reshape(8, 8, 2049)
    for wrong, fault in (
        ([(inputs.int(), labels.int()) for inputs, labels in right], "gives torch.int32 (8, 2048)"),
        ([(inputs[:, 1:], labels[:, 1:]) for inputs, labels in right], "gives torch.int64 (8, 2047)"),
        ([(inputs, inputs) for inputs, _ in right], "has labels that are not the next inputs"),
        ([(labels.flip(1), inputs.flip(1)) for inputs, labels in right], "gives other ids than the documents have"),
        ([(torch.zeros_like(inputs),) * 2 for inputs, _ in right], "gives other ids than the documents have"),
        ([*right, right[0]], "repeats windows"),
        ([windows.split(rows) for rows in in_order], "is not shuffled"),
    ):
        assert fault in windows.faults(wrong), fault
