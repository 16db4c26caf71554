"""The benchmark of saves runs as a script, and its exit code says whether its bounds were kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_number_is_there_and_nothing_is_left(ranks: int, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/saving.py", "configs/debug.yaml", "train.device=cpu", "--json"]
    options = ["--ranks", str(ranks), "--steps", "5", "--rounds", "2", "--folder", str(tmp_path)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert (report["parameters"], report["ranks"], report["rounds"]) == (131_520, ranks, 2)
    for key in ("step_seconds", "synchronous_seconds", "blocked_seconds", "committed_seconds", "writer_cpu_seconds"):
        assert report[key] > 0, key
    # A copy in memory against the same, a write, hashes and the disk.
    assert report["blocked_seconds"] < report["synchronous_seconds"]
    # Of a model this small a step takes as long as a save: only the sign of the verdict is meant.
    kept = report["blocked_ratio"] <= 0.15 and report["added_ratio"] <= 1.5 and report["committed_seconds"] <= 120
    assert (done.returncode == 0) == kept
    assert list(tmp_path.iterdir()) == []
