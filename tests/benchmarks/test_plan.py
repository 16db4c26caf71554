"""The benchmark of predicted step times runs as a script, and its exit code says whether its bound was kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parents[2]


def test_five_shapes_are_predicted_by_the_constant_of_a_sixth() -> None:
    options = ["--steps", "9", "--rounds", "1", "--head-size", "16", "--sequence", "64", "--json"]
    command = [sys.executable, "benchmarks/plan.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stderr
    calibrated, *others = json.loads(done.stdout)["shapes"]
    assert calibrated["error"] == pytest.approx(0, abs=2e-3), "what it is fitted to"
    assert len(others) == 5
    for row in others:
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    # Steps of models this small are mostly Python: only the sign of the verdict is meant.
    assert (done.returncode == 0) == all(abs(row["error"]) <= 0.15 for row in others)
