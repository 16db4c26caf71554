"""The checkpoint benchmark runs as a script and says what every contender wrote and how long it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parents[2]


def run_checkpoint(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/checkpoint.py", "configs/debug.yaml", "train.device=cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(("ranks", "dtype"), [(1, "fp32"), (2, "bf16")])
def test_every_contender_has_every_number_and_leaves_nothing(ranks: int, dtype: str, tmp_path: Path) -> None:
    done = run_checkpoint(
        f"train.dtype={dtype}", "--ranks", str(ranks), "--rounds", "2", "--folder", str(tmp_path), "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["parameters"], report["dtype"], report["ranks"]) == (131_520, dtype, ranks)
    # The limit is for models that are not small: here names and places of tensors weigh more than a byte each.
    assert report["limit_bytes_per_parameter"] is None
    assert tuple(report["contenders"]) == ("torch.save", "megallama", "deepspeed")
    for found in report["contenders"].values():
        assert len(found["save_rounds"]) == len(found["load_rounds"]) == 2
        assert min(found["save_seconds"], found["load_seconds"], found["save_ratio"], found["load_ratio"]) > 0
        assert found["unwritten_seconds"] >= 0
        # 4 bytes of weight and 8 of moments; DeepSpeed keeps the weights of the model besides.
        assert 12 < found["bytes_per_parameter"] < 20
        assert found["bytes"] == pytest.approx(found["bytes_per_parameter"] * 131_520)
    assert report["contenders"]["megallama"]["bytes_per_parameter"] < 13
    assert report["contenders"]["torch.save"]["save_ratio"] == report["contenders"]["torch.save"]["load_ratio"] == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = run_checkpoint("model.hidden_size=1048576", "--folder", str(tmp_path))
    assert done.returncode == 2
    assert f"--folder={tmp_path} has " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
