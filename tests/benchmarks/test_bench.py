"""The table of `make bench`, rehearsed: its rows have their contenders, which did the same work, and what they sent."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megallama.config.load import load_config
from megallama.layout.counts import flops_per_token

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
ROWS = ("C1-fp32", "C3", "C4", "C5-ranks", "C8", "G")
HIDDEN = 4 * 2 * 64 * 64
"""Bytes of the hidden states of a rehearsal."""


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread a process: on a busy machine threads that wait for each other cost most of the time.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/bench.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What was printed, and the rows."""
    out = tmp_path_factory.mktemp("bench")
    words = ("--rehearse", "--rows", ",".join(ROWS), "--gpu-out", str(out / "gpu"), "--json", str(out / "bench.json"))
    done = bench(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "bench.json").read_text())
    assert report["rehearsal"] and report["machine"]["torch"] == torch.__version__
    return done.stdout, report["rows"]


def lines(rows: dict[str, Any], row: str) -> dict[str, Any]:
    return {line["contender"]: line for line in rows[row]["lines"]}


def test_contenders_of_a_row_did_the_same_work(rehearsal: tuple[str, dict[str, Any]]) -> None:
    rows = rehearsal[1]
    assert tuple(rows) == ROWS
    assert set(lines(rows, "C1-fp32")) == {"engine", "transformers", "floor"}
    assert {"ours, sequence parallel", "ours", "DTensor, sequence parallel", "DTensor"} <= set(lines(rows, "C3"))
    assert {f"{name}, m = {m}" for name in ("ours", "torch Schedule1F1B") for m in (2, 4)} <= set(lines(rows, "C4"))
    assert {"engine, ZeRO 1", "engine, ZeRO 2", "DDP", "DDP, ZeroRedundancyOptimizer"} == set(lines(rows, "C5-ranks"))
    for row in ("C1-fp32", "C3", "C4", "C5-ranks"):
        assert rows[row]["wrong"] == []
        for contender, line in lines(rows, row).items():
            assert line["seconds"] > 0 and line["ratio"] > 0
            assert contender == "floor" or line["loss_difference"] < 1e-4


def test_a_training_step_has_its_share_of_the_floor_and_its_memory(rehearsal: tuple[str, dict[str, Any]]) -> None:
    found = lines(rehearsal[1], "C1-fp32")
    assert found["floor"]["of_floor"] == 1.0
    for name in ("engine", "transformers"):
        assert 0 < found[name]["of_floor"] < 1, "a model computes all of the floor"
        assert found[name]["memory_bytes"] > 2**20


def test_a_layer_with_sequence_parallelism_sends_what_it_must(rehearsal: tuple[str, dict[str, Any]]) -> None:
    """torch's plan keeps what it gathers: that is the least, four whole tensors each way (arXiv 2205.05198)."""
    found = lines(rehearsal[1], "C3")
    assert found["DTensor, sequence parallel"]["counted"] == "4 all-gather 0.1, 4 reduce-scatter 0.1"
    assert found["ours"]["counted"] == f"4 all-reduce {4 * HIDDEN / 2**20:.1f}"
    aims = {aim["what"]: aim["found"] for aim in rehearsal[1]["C3"]["aims"]}
    assert 8 <= aims["collectives of a layer, ours, sequence parallel"] <= 12


def test_a_checkpoint_is_saved_and_loaded_by_all_and_waited_for_by_those_that_write_beside(
    rehearsal: tuple[str, dict[str, Any]],
) -> None:
    found = lines(rehearsal[1], "C8")
    names = ("torch.save", "megallama", "dcp", "dcp-async", "deepspeed")
    assert {f"{name}, {what}" for name in names for what in ("save", "load")} <= set(found)
    assert found["megallama, save"]["ratio"] == found["megallama, load"]["ratio"] == 1
    assert 0 < found["dcp-async, training waits"]["seconds"] < found["dcp-async, save"]["seconds"]
    assert found["ours, training waits"]["seconds"] > 0


def test_what_is_left_out_is_said(rehearsal: tuple[str, dict[str, Any]]) -> None:
    printed, rows = rehearsal
    assert "sequence parallel not supported by torch LayerNorm" in printed  # megatron-core's own
    if not torch.cuda.is_available():
        assert rows["G"]["notes"] == ["G1 to G6 are left out: this machine has no GPU"]


def test_a_contender_that_did_other_work_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    names = ("rows.one_process", "step", "rows.table", "contenders.worker")
    one_process, step, table, worker = map(import_module, names)
    config = load_config(ROOT / "benchmarks" / "bench.yaml")

    def score(loss: float) -> Any:
        return step.Score([worker.Round([0.1, 0.1], 0.2, [loss, loss / 2], 2**20) for _ in range(3)], 0)

    for loss, wrong in ((2.0, 0), (2.0 * (1 + 1e-5), 0), (2.0 * (1 + 1e-3), 1), (math.nan, 1)):
        found = table.Found()
        scores = {"engine": score(2.0), "bare": score(loss)}
        one_process.compare("C1", scores, config, found, lambda _: "engine")
        assert len(found.wrong) == wrong, loss


def test_the_floor_is_the_products_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the planner counts them, with attention over half of the square."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    floor = import_module("contenders.floor")
    config = load_config(ROOT / "benchmarks" / "bench.yaml", ["train.global_batch_size=8"])
    with FlopCounterMode(display=False) as counter:
        floor.floor_step(config, torch.device("cpu"))()
    expected = flops_per_token(config.model, config.data.sequence_length, "causal") * config.tokens_per_step
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)


def test_a_row_of_another_name_is_a_mistake_of_the_user() -> None:
    done = bench("--rows", "C1,C9")
    assert (done.returncode, done.stdout) == (2, "")
    assert "C9 is none of C1-fp32, C1-bf16, C2-32k" in done.stderr
    assert "Traceback" not in done.stderr
