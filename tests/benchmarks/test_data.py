"""The benchmark of builds runs as a script, and all contenders write the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.text.tokenizer import tokenizer_from_ranks

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parents[2]


def test_every_contender_is_measured_on_the_same_text(tmp_path: Path) -> None:
    tokenizer_from_ranks({bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}).save(tmp_path)
    command = [sys.executable, "benchmarks/data.py", "--tokenizer", str(tmp_path), "--megabytes", "1", "--json"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--workers", "2"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert 0.9 < report["text_megabytes"] <= 1
    found = report["contenders"]
    assert list(found) == ["bare", "reading", "megallama 2", "megatron 2", "datatrove 2"]
    assert found["reading"].pop("tokens") == 0
    assert found["megatron 2"].pop("tokens") >= found["bare"]["tokens"]  # it keeps empty documents
    assert len({row["tokens"] for row in found.values() if "tokens" in row}) == 1
    assert all(row["megabytes_per_second"] > 0 and row["processor_seconds"] > 0 for row in found.values())
    assert (done.returncode == 0) == all(report["aims"].values())
