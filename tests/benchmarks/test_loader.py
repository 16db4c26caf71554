"""The loader is far ahead of the model, and a mixture starts anywhere with few files and at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parents[2]


def test_the_loader_keeps_its_bounds(slowness: float) -> None:
    command = [sys.executable, "benchmarks/loader.py", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["loader_over_model"] > 50
    assert report["start"]["sources"] == 1000
    assert report["start"]["processor_seconds"] < 1.0 * slowness
    assert report["start"]["open_files"] < 20
    assert report["sample_of_1e12_microseconds"] < 200
    assert report["longest_order_seconds"] < 0.6 * slowness
