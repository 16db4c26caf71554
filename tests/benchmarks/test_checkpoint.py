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


@pytest.mark.parametrize(("ranks", "dtype", "tensor"), [(1, "fp32", 1), (2, "fp32", 1), (2, "bf16", 2)])
def test_every_contender_has_every_number_and_leaves_nothing(
    ranks: int, dtype: str, tensor: int, tmp_path: Path
) -> None:
    words = (f"train.dtype={dtype}", f"parallel.tensor={tensor}", "--ranks", str(ranks), "--rounds", "2")
    done = run_checkpoint(*words, "--folder", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["parameters"], report["dtype"], report["ranks"]) == (131_520, dtype, ranks)
    # The limit is for models that are not small: here names and places of tensors weigh more than a byte each.
    assert report["limit_bytes_per_parameter"] is None
    assert tuple(report["contenders"]) == ("torch.save", "megallama", "dcp", "dcp-async", "deepspeed")
    for found in report["contenders"].values():
        assert len(found["save_rounds"]) == len(found["load_rounds"]) == 2
        assert min(found["save_seconds"], found["load_seconds"], found["save_ratio"], found["load_ratio"]) > 0
        assert found["unwritten_seconds"] >= 0
        assert 0 < found["stall_seconds"] < found["save_seconds"]
        # 4 bytes of weight and 8 of moments; DeepSpeed keeps the weights of the model besides, and some keep twice
        # what both tensor-parallel ranks hold.
        assert 12 < found["bytes_per_parameter"] < 12 * 2
        assert found["bytes"] == pytest.approx(found["bytes_per_parameter"] * 131_520)
    sizes = {name: found["bytes_per_parameter"] for name, found in report["contenders"].items()}
    assert sizes["megallama"] < 13
    assert max(sizes["torch.save"], sizes["dcp"], sizes["dcp-async"]) < 16, "the same content"
    for name in ("megallama", "dcp-async"):
        rounds = (report["contenders"][name][f"{what}_rounds"] for what in ("stall", "save"))
        assert all(stall < save for stall, save in zip(*rounds, strict=True)), "another process writes"
    assert report["contenders"]["torch.save"]["save_ratio"] == report["contenders"]["torch.save"]["load_ratio"] == 1
    assert list(tmp_path.iterdir()) == []


def test_what_two_tensor_parallel_ranks_saved_is_what_one_rank_loads(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/resharding.py", "configs/debug.yaml", "--rounds", "2", "--json"]
    command += ["--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["parameters"], report["rounds"]) == (131_520, 2)
    assert tuple(report["contenders"]) == ("megallama", "dcp")
    for found in report["contenders"].values():
        assert min(found["same_seconds"], found["resharded_seconds"], found["ratio"]) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = run_checkpoint("model.hidden_size=1048576", "--folder", str(tmp_path))
    assert done.returncode == 2
    assert f"--folder={tmp_path} has " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
