"""A start holds a rank's own part, draws its weights in threads, and makes a few groups whatever the world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parents[2]


def test_a_start_keeps_its_bounds() -> None:
    command = [sys.executable, "benchmarks/start.py", "--ranks", "8", "--layers", "1", "--rows", "1024"]
    command += ["--launched", "2", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["memory"]) == ["ZeRO 1", "ZeRO 2", "ZeRO 3"]
    for stage, row in report["memory"].items():
        assert row["ratio"] <= 1.3, stage
    assert report["memory"]["ZeRO 3"]["state"] == pytest.approx(18 / 4, rel=0.01)
    # The largest weight, of 128,256 rows of 8,192 in bf16, is whole for a moment; all of them would be 8 GiB in fp32.
    assert 2 < report["large"]["peak"] < 2.6 < report["large"]["planned"] / 1.3
    groups = report["groups"]
    assert groups["8 own"]["made"] == 4
    assert groups["8 everywhere"]["made"] == 4 + 4 + 4 + 2
    assert all(rate > 1e6 for rate in report["drawn"].values())
    assert 1 < report["launched"]["2"] < 120
