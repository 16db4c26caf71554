"""The event that sets the tenth step of a start beside its plan."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from statistics import median

import pytest

from megallama.config.load import load_config
from megallama.hardware.gpus import load_hardware
from megallama.plan.memory.ledger import memory_rows
from megallama.plan.time.software import find_software, machine
from megallama.plan.time.step_time import step_time
from megallama.run_dir.terminal import lines_of
from megallama.train.plan_check import compared_memory, compared_seconds
from tests.launching import ROOT, arguments, events, pretrain

CALIBRATED = "cpu: {peak_tflops: 0.1, memory_tb_s: 0.02, efficiency: {calibrated: 0.5, other: 0.9}}"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home of a user who has calibrated this machine's CPU."""
    folder = tmp_path / "home"
    file = folder / ".config" / "megallama" / "hardware.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(CALIBRATED)
    return folder


def plant_home(home: str) -> None:
    os.environ["HOME"] = home


def train(dataset: str, run_dir: Path, home: Path, *more: str) -> None:
    words = arguments(dataset, run_dir, "train.steps=24", "evaluation.every=0", "checkpoint.every=0", *more)
    assert pretrain(1, words, plant=partial(plant_home, str(home))) == [(0, "")]


def test_the_tenth_step_of_each_start_is_set_beside_its_plan(byte_dataset: str, tmp_path: Path, home: Path) -> None:
    run_dir = tmp_path / "run"
    train(byte_dataset, run_dir, home, "train.stop_after=12")
    train(byte_dataset, run_dir, home)
    found = events(run_dir, "forecast")
    assert [event["step"] for event in found] == [10, 22]
    timed = {event["step"]: event["seconds"] for event in events(run_dir, "train")}
    cpu = load_hardware(home / ".config" / "megallama" / "hardware.yaml")["cpu"]
    predicted = step_time(load_config(run_dir / "config.yaml"), 1, machine(cpu, find_software(cpu, "calibrated"))).total
    for event, before in zip(found, (range(3, 11), range(15, 23)), strict=True):
        assert (event["gpu"], event["software"]) == ("cpu", "calibrated")
        assert event["predicted_seconds"] == predicted
        assert event["seconds"] == median(timed[step] for step in before)
        assert "peak_memory_bytes" not in event, "torch's allocator keeps no count on a CPU"


def test_what_cannot_be_predicted_is_not_compared(byte_dataset: str, tmp_path: Path) -> None:
    train(byte_dataset, tmp_path / "run", tmp_path, "train.stop_after=12")
    assert events(tmp_path / "run", "forecast") == []


def test_a_device_that_no_table_has_is_not_guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(ROOT / "configs" / "7b.yaml")
    assert compared_seconds(config, 128, "NVIDIA H900", 1.0) == {}
    assert compared_seconds(config, 128, "cpu", 1.0) == {}
    found = compared_seconds(config, 128, "NVIDIA H100 80GB HBM3", 1.5)
    predicted = step_time(config, 128, machine(load_hardware()["h100-80g"])).total
    assert found == {"gpu": "h100-80g", "software": "pytorch-2024", "seconds": 1.5, "predicted_seconds": predicted}
    fp32 = load_config(ROOT / "configs" / "7b.yaml", ["train.dtype=fp32"])
    assert compared_seconds(fp32, 128, "NVIDIA H100 80GB HBM3", 1.5) == {}


def test_allocated_memory_is_compared_without_the_overhead_of_the_plan() -> None:
    config = load_config(ROOT / "configs" / "7b.yaml")
    found = compared_memory(config, 16, 3, 4)
    ranks = memory_rows(config, 16)
    sizes = [{row.key: row.size for row in rows} for rows in ranks]
    assert (found["peak_memory_bytes"], found["peak_reserved_bytes"]) == (3, 4)
    assert found["predicted_device_bytes"] == max(sum(each.values()) for each in sizes)
    assert found["predicted_memory_bytes"] == max(sum(each.values()) - each["overhead"] for each in sizes)


def test_the_line_has_measured_and_predicted_and_what_is_between() -> None:
    seconds = {"seconds": 2.0, "predicted_seconds": 1.9}
    memory = {"peak_memory_bytes": 10 << 30, "predicted_memory_bytes": 11 << 30}
    said = "2 s a step, predicted 1.9 s (-5.0%)"
    kept = "mem 10.00 GiB, predicted 11.00 GiB (+10.0%)"
    assert lines_of({"event": "forecast", "step": 10, **seconds}) == [f"step 10  {said}"]
    assert lines_of({"event": "forecast", "step": 10, **memory}) == [f"step 10  {kept}"]
    assert lines_of({"event": "forecast", "step": 10, **seconds, **memory}) == [f"step 10  {said}  {kept}"]
