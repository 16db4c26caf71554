"""Steps that stand out are skipped, and after several in a row the run goes back and passes over their samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.checkpoint.state import read_saved
from megallama.run_dir.events import standing_events
from tests.launching import arguments, events, pretrain

BATCH = 4
BAD = range(34 * BATCH, 37 * BATCH)
"""What steps 35 to 37 read first, in the order of the data."""


def words(dataset: str, run_dir: Path, *more: str) -> list[str]:
    """Forty steps that save every fifth; two skipped in a row are too many."""
    health = ["health.window=16", "health.spike_deviations=12", "train.max_skipped=2"]
    length = ["train.steps=40", "optimizer.lr=1e-2", "checkpoint.every=5", "checkpoint.keep=20", "evaluation.every=0"]
    return arguments(dataset, run_dir, *length, *health, *more)


def spoiled(numbers: range) -> None:
    """The samples of these numbers, in the order of the data, are noise."""
    import megallama.data.source

    source: Any = megallama.data.source
    sample = source.Windows.sample

    def read(self: Any, number: int) -> Any:
        if number in numbers and self.sampler is not None:
            return np.random.default_rng(number).integers(0, 256, self.sequence_length + 1)
        return sample(self, number)

    source.Windows.sample = read


def saved_state(run: Path, step: int) -> Any:
    return read_saved(run / "checkpoints" / f"step_{step:08d}").state


def final_loss(run: Path) -> float:
    trained = [event for event in standing_events(run) if event["event"] == "train"]
    assert [event["step"] for event in trained] == list(range(1, 41))
    return sum(event["loss"] for event in trained[-2:]) / 2


@pytest.mark.parametrize(("ranks", "layout"), [(1, []), (2, ["parallel.tensor=2", "zero.stage=3"])])
def test_noise_in_the_data_is_skipped_and_then_passed_over(
    byte_dataset: str, tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    run, clean = tmp_path / "run", tmp_path / "clean"
    assert pretrain(ranks, words(byte_dataset, run, *layout), plant=partial(spoiled, BAD)) == [(0, "")] * ranks
    assert pretrain(1, words(byte_dataset, clean)) == [(0, "")]

    skips, (rewind,) = events(run, "skip"), events(run, "rewind")
    assert [(skip["step"], skip["reason"], skip["of_data"]) for skip in skips] == [
        (35, "loss", [136, 140]),
        (36, "loss", [140, 144]),
        (35, "loss", [144, 148]),
    ]
    assert all(skip["loss"] > 5 for skip in skips)
    assert (rewind["step"], rewind["samples"], rewind["passed_over"]) == (30, 120, [136, 144])
    assert rewind["set_aside"] == {"step_00000035": "step_00000035.undone-1"}
    state = saved_state(run, 40)
    assert (state.step, state.samples, state.updates) == (40, 160, 39)
    assert (state.rewinds, state.passed_over) == (1, ((136, 144),))
    assert saved_state(run, 30).passed_over == ()
    assert final_loss(run) == pytest.approx(final_loss(clean), abs=0.2)
