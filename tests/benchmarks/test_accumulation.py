"""The benchmark of gradient sums runs as a script, and says why training takes the way that it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parents[2]


def run_accumulation(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/accumulation.py", "configs/debug.yaml", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_the_hand_over_holds_less_than_a_late_one_and_is_nearer_to_fp32() -> None:
    layout = ["parallel.pipeline=2", "parallel.schedule=zbvzerobubble", "model.num_hidden_layers=4"]
    done = run_accumulation(*layout, "train.global_batch_size=32", "train.micro_batch_size=1", "--json")
    assert done.returncode == 0, done.stderr
    taken, late = json.loads(done.stdout).values()
    # 4 of the sum, and 2 of one of two stages, the one with the final norm, until it has handed its gradients over.
    assert 4 < taken["bytes_per_parameter"] < 5.01 < late["bytes_per_parameter"]
    assert 1.05 * taken["mean_error"] < late["mean_error"]


def test_a_run_without_a_pipeline_is_refused() -> None:
    done = run_accumulation()
    assert done.returncode == 2
    assert "parallel.pipeline=1 has no schedule to compare under" in done.stderr
    assert "Traceback" not in done.stderr
