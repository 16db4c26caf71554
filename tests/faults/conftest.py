"""Runs that nothing happened to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.runs import Layout, words
from tests.launching import pretrain

Undisturbed = Callable[[Layout, int], Path]


@pytest.fixture(scope="session")
def undisturbed(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The run directory of a run of that many steps at that layout, trained when it is first asked for."""
    trained: dict[tuple[Layout, int], Path] = {}

    def find(layout: Layout, num_steps: int) -> Path:
        if (layout, num_steps) not in trained:
            run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
            listing = words(byte_dataset, run_dir, layout, f"train.steps={num_steps}")
            assert pretrain(layout.world_size, listing) == [(0, "")] * layout.world_size
            trained[layout, num_steps] = run_dir
        return trained[layout, num_steps]

    return find
