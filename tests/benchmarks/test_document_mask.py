"""The benchmark of the document mask runs as a script and says every number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/document_mask.py", "configs/debug.yaml", "train.device=cpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_long_documents_are_faster_within_a_mask_than_without() -> None:
    longer = ["data.sequence_length=2048", "model.max_position_embeddings=2048", "train.global_batch_size=1"]
    done = run(*longer, "train.micro_batch_size=1", "--lengths", "64", "--steps", "3", "--json")
    assert done.returncode == 0, done.stderr
    plain, masked = json.loads(done.stdout).values()
    assert plain["speed"] == 1
    assert masked["tokens_per_second"] == pytest.approx(2048 / masked["seconds"])
    assert masked["speed"] > 1, "attention is most of such a step, and computes a thirtieth of it"


def test_a_config_that_cannot_run_is_refused() -> None:
    done = run("parallel.tensor=3")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
