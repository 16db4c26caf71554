"""The step benchmark runs as a script, says every number, and shows that its contenders did the same work."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.benchmarks
ROOT = Path(__file__).parents[2]
CONTENDERS = ("engine", "bare", "transformers")


def run_step(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/step.py", "configs/debug.yaml", "train.device=cpu", *arguments]
    # One thread a process: on a busy machine threads that wait for each other cost most of the time.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = run_step("--steps", "2", "--warmup", "1", "--rounds", "3", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_contender_has_every_number(report: dict[str, Any]) -> None:
    assert tuple(report["contenders"]) == CONTENDERS
    for found in report["contenders"].values():
        assert all(math.isfinite(value) for value in found.values())
        assert found["tokens_per_second"] == pytest.approx(8 * 64 / found["seconds"])
        assert 0 < found["mfu_causal"] < found["mfu"]
        assert 0 < found["memory_before_bytes"] < found["peak_memory_bytes"]


def test_the_ratios_are_those_of_the_engine_round_by_round(report: dict[str, Any]) -> None:
    assert set(report["ratios"]) == {"engine/bare", "engine/transformers"}
    for found in report["ratios"].values():
        assert len(found["rounds"]) == 3
        assert sorted(found["rounds"])[1] == found["median"] > 0


def test_all_contenders_train_to_the_same_loss(report: dict[str, Any]) -> None:
    first, *others = (found for found in report["contenders"].values())
    assert first["last_loss"] < 0.999 * first["first_loss"]
    for other in others:
        assert other["last_loss"] == pytest.approx(first["last_loss"], rel=1e-4)
    assert report["loss_difference"] <= report["loss_tolerance"] == 1e-4


def test_the_numbers_say_what_they_rest_on(report: dict[str, Any]) -> None:
    assert report["parameters"] == 131_520
    assert (report["dtype"], report["device"], report["threads"]) == ("fp32", "cpu", 1)
    assert report["peak_flops"] > 0
    assert "measured" in report["peak_source"]


def test_bf16_contenders_do_the_same_work_and_print_a_table() -> None:
    done = run_step("train.dtype=bf16", "--steps", "2", "--warmup", "1", "--rounds", "3", "--contenders", "engine,bare")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "time ratio engine/bare" in done.stdout
    assert "the same work" in done.stdout


def test_an_unknown_contender_is_a_mistake_of_the_user() -> None:
    done = run_step("--contenders", "engine,megatron")
    assert done.returncode == 2
    assert "megatron is none of engine, bare" in done.stderr
    assert "Traceback" not in done.stderr
