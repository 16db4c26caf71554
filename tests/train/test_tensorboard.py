"""TensorBoard: the folder of a run, read back by its own package, has the numbers of metrics.jsonl."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megallama.run_dir.events import standing_events
from tests.launching import arguments, pretrain

BOARD = "logging.tensorboard=true"


def test_the_folder_of_a_run_that_was_started_again_has_its_numbers(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = arguments(byte_dataset, run_dir, BOARD, "checkpoint.every=1", "checkpoint.keep=9")
    assert pretrain(1, [*words, "train.stop_after=3"]) == [(0, "")]
    shutil.rmtree(run_dir / "checkpoints" / "step_00000003")  # back to the second step
    assert pretrain(1, words) == [(0, "")]
    found = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    standing = standing_events(run_dir)
    for kind in ("train", "checkpoint"):
        events = [event for event in standing if event["event"] == kind]
        for key in {"train": ("loss", "grad_norm", "lr", "mfu"), "checkpoint": ("bytes",)}[kind]:
            read = [(each.step, each.value) for each in found.Scalars(f"{kind}/{key}")]
            assert read == [(event["step"], np.float32(event[key])) for event in events]
        assert [event["step"] for event in events] == [1, 2, 3, 4]
    evaluated = [e for e in standing if e["event"] == "eval" and e["split"] == "validation"]
    read = [(each.step, each.value) for each in found.Scalars("eval/validation/perplexity")]
    assert read == [(event["step"], np.float32(event["perplexity"])) for event in evaluated]
    assert pretrain(1, [*words, "train.stop_after=1", "checkpoint.resume=never"]) == [(0, "")]
    anew = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [each.step for each in anew.Scalars("train/loss")] == [1]
    assert (run_dir / "tensorboard.1").is_dir()


def test_without_its_package_nothing_is_written(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", BOARD)
    sentence = (
        "logging.tensorboard=true needs the package tensorboard, which is not installed; "
        "pip install 'megallama[tensorboard]', or use logging.tensorboard=false"
    )
    assert pretrain(1, words, plant=hide_tensorboard) == [(2, f"megallama: {sentence}\n")]
    assert not (tmp_path / "run").exists()


def hide_tensorboard() -> None:
    modules: dict[str, Any] = sys.modules
    modules["tensorboard"] = None
