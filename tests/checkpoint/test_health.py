"""A run that diverges keeps the checkpoints from before it, and the next start continues one of them or says how to."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.checkpoint.commands.listing import entries
from megallama.checkpoint.format import BEST, LATEST, STATE, TENSORS, complete_checkpoints, read_document, step_of
from megallama.checkpoint.health import is_healthy
from megallama.checkpoint.reading.rollback import roll_back
from megallama.checkpoint.tensors import is_weight
from megallama.checkpoint.writing.commit import Retention, apply_retention
from megallama.cluster.starts import newest_step
from megallama.generation.load import load_model
from tests.checkpoint.damaging import CHECKPOINT, copy_as, edit, rewrite
from tests.launching import arguments, events, pretrain

STEPS = 10
WILD = ["optimizer.lr=1e25", f"train.stop_after={STEPS + 4}"]
LAYOUTS = {
    "bf16": (1, ("train.dtype=bf16",)),
    "zero2": (2, ("zero.stage=2",)),
    "tp2": (2, ("parallel.tensor=2",)),
}


def words(dataset: str, run_dir: Path, *more: str) -> list[str]:
    """Saves after each step; evaluates at the end of a start."""
    schedule = ["train.steps=30", "schedule.kind=constant", "evaluation.every=0", "checkpoint.every=1"]
    return arguments(dataset, run_dir, *schedule, f"train.stop_after={STEPS}", *more)


def named(run_dir: Path) -> dict[int, bool]:
    """Whether each checkpoint is healthy, by step."""
    return {step_of(path): is_healthy(path) for path in complete_checkpoints(run_dir / "checkpoints")}


def texts(run_dir: Path) -> list[str]:
    return [event["text"] for event in events(run_dir, "notice")]


@pytest.fixture(scope="module")
def good(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten good steps; tests copy it."""
    run_dir = tmp_path_factory.mktemp("good") / "run"
    assert pretrain(1, words(byte_dataset, run_dir)) == [(0, "")]
    assert named(run_dir) == {10: True, 9: True}
    return run_dir


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "run")


@pytest.mark.parametrize(("layout", "keep"), [("bf16", 1), ("zero2", 1), ("tp2", 2)])
def test_a_run_that_diverges_keeps_the_last_good_checkpoints_and_the_next_start_takes_one(
    layout: str, keep: int, byte_dataset: str, run: Path
) -> None:
    ranks, more = LAYOUTS[layout]
    start = words(byte_dataset, run, f"checkpoint.keep={keep}", *more)
    assert pretrain(ranks, [*start, *WILD]) == [(0, "")] * ranks
    assert len(events(run, "skip")) == 3
    assert named(run) == {14: False} | {step: True for step in (10, 9)[:keep]}
    assert (run / "checkpoints" / LATEST).read_text() == "step_00000010"
    assert newest_step(run) == STEPS
    assert "go back to it with `megallama checkpoint rollback " in texts(run)[-1]

    assert pretrain(ranks, [*start, "train.stop_after=15"]) == [(0, "")] * ranks
    assert [event["step"] for event in events(run, "resume")] == [10, 10]
    assert "passed over step_00000014, which was not healthy when it was saved; set aside as" in texts(run)[-1]
    assert all(event["grad_norm"] < 100 for event in events(run, "train")[-5:])
    assert named(run) == {step: True for step in (15, 14)[:keep]}
    assert (run / "checkpoints" / "step_00000014.undone-1").is_dir()


def spoil(first: int, last: int) -> None:
    """The gradients of the steps `first` to `last` are not finite, though the weights are sound: no norm tells it."""
    import megallama.train.loop

    train: Any = megallama.train.loop
    original = train.train_step

    def spoiled(run: Any, *rest: Any) -> Any:
        parameter, calls = next(iter(run.model.parameters())), run.requests.__dict__.setdefault("calls", [])
        calls.append(run)
        if first <= len(calls) <= last:
            handle = parameter.register_hook(lambda gradient: gradient * math.nan)
            result = original(run, *rest)
            handle.remove()
            return result
        return original(run, *rest)

    train.train_step = spoiled


def test_the_save_before_a_streak_replaces_nothing_until_the_run_has_trained_on_from_it(
    byte_dataset: str, tmp_path: Path
) -> None:
    """The save right after the update that ruins a run looks as sound as any."""
    run = tmp_path / "run"
    start = words(
        byte_dataset, run, "checkpoint.keep=1", "train.max_skipped=3", "health.max_rewinds=0", "train.stop_after=30"
    )
    assert pretrain(1, start, plant=partial(spoil, 5, 9)) == [(1, "")]
    assert named(run) == {7: False, 4: True, 3: True}
    reason = json.loads((run / "outcome.json").read_text())["reason"]
    assert reason.startswith(f"3 steps in a row were skipped, see {run}/diagnosis.txt; try a lower optimizer.lr or ")
    assert reason.endswith(f"step_00000003: go back to it with `megallama checkpoint rollback {run} 3`")
    roll_back(run, "3")
    assert pretrain(1, [*start, "train.stop_after=5"]) == [(0, "")]
    assert [event["step"] for event in events(run, "resume")] == [3]
    assert named(run) == {5: True}


def test_a_streak_that_ends_leaves_nothing_behind(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(1, words(byte_dataset, run), plant=partial(spoil, 5, 7)) == [(0, "")]
    assert [event["step"] for event in events(run, "skip")] == [5, 6, 7]
    assert named(run) == {10: True, 9: True}
    assert texts(run) == []


def ruined(rank: int) -> None:
    """What `rank` has loaded is not finite."""
    import os

    import megallama.train.saves

    train: Any = megallama.train.saves
    original = train.load

    def load(path: Path, engine: Any, model: Any) -> Any:
        state = original(path, engine, model)
        if int(os.environ["RANK"]) == rank:
            list(engine.fragments())[-1].moments["exp_avg_sq"].view(-1)[-1] = math.nan
        return state

    train.load = load


def no_loss(rank: int) -> None:
    """The first loss of `rank` is not finite."""

    import megallama.train.loop

    train: Any = megallama.train.loop
    original = train.train_step

    def train_step(run: Any, *rest: Any) -> Any:
        forward_backward = run.engine.forward_backward
        if run.mesh.rank == rank:
            run.engine.forward_backward = lambda *given: forward_backward(*given) * math.nan
        return original(run, *rest)

    train.train_step = train_step


@pytest.mark.parametrize(
    ("plant", "what"),
    [(ruined, "weights or moments of "), (no_loss, "the weights that were loaded at step 10 give")],
)
def test_what_is_not_finite_at_a_resume_ends_it_on_every_rank_with_the_way_back(
    plant: Callable[[int], None], what: str, byte_dataset: str, run: Path
) -> None:
    start = words(byte_dataset, run, "train.stop_after=12")
    (first, said), (second, _) = pretrain(2, start, plant=partial(plant, 1))
    assert (first, second) == (2, 2)
    assert said.startswith(f"megallama: {what}")
    assert said.endswith(f"step_00000009: go back to it with `megallama checkpoint rollback {run} 9`\n")
    assert json.loads((run / "outcome.json").read_text())["status"] == "failed"
    roll_back(run, "9")
    assert pretrain(2, start) == [(0, "")] * 2
    assert [event["step"] for event in events(run, "resume")] == [10, 9]


def test_weights_beyond_measure_that_an_older_version_took_for_sound_end_a_resume(byte_dataset: str, run: Path) -> None:
    """Their loss is finite, for a norm layer makes zeros of them, and no gradient is."""
    scale(run / "checkpoints" / "step_00000010", 1e24)
    start = words(byte_dataset, run, "train.stop_after=12")
    ((code, said),) = pretrain(1, start)
    assert code == 2
    assert said.startswith("megallama: the weights that were loaded at step 10 are too large: no gradient is finite; ")
    assert said.endswith(f"`megallama checkpoint rollback {run} 9`\n")
    roll_back(run, "9")
    assert pretrain(1, start) == [(0, "")]
    assert named(run) == {12: True, 11: True}


def test_a_run_that_was_never_healthy_is_continued_and_then_says_how_to_start_over(
    byte_dataset: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start = words(byte_dataset, run, "optimizer.lr=1e25", "train.stop_after=2")
    assert pretrain(1, start) == [(0, "")]
    assert named(run) == {2: False}
    ((code, said),) = pretrain(1, [*start, "optimizer.lr=1e-3", "train.stop_after=6"])
    assert code == 2
    assert said.endswith(
        "; no healthy checkpoint is before step 2: start over with checkpoint.resume=never (deletes nothing)\n"
    )
    assert "step_00000002, which this start continues, was not healthy when it was saved" in texts(run)


def scale(path: Path, factor: float) -> None:
    """Multiply the weights of a checkpoint, which says nothing of its health."""
    tensors = json.loads((path / TENSORS).read_bytes())["tensors"]
    numbers = np.frombuffer((path / "rank_00000.bin").read_bytes(), np.float32).copy()
    for name, tensor in tensors.items():
        for chunk in tensor["chunks"] if is_weight(name) else ():
            begin = chunk["start"] // 4
            numbers[begin : begin + math.prod(chunk["shape"])] *= factor
    rewrite(path / "rank_00000.bin", numbers.tobytes())
    edit(path / STATE, lambda content: content.pop("healthy"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of the steps 1 to 5, of which the last two are not healthy; the last has the lowest loss."""
    folder = tmp_path / "run" / "checkpoints"
    for step in range(1, 6):
        path = copy_as(CHECKPOINT, step, folder)
        edit(path / STATE, lambda content, step=step: content["state"].update(validation_loss=6.0 - step))
    for step in (4, 5):
        edit(folder / f"step_{step:08d}" / STATE, lambda content: content.update(healthy=False))
    return folder


@pytest.mark.parametrize(("proven", "left"), [(False, [5, 3, 2]), (True, [5, 3])])
def test_retention_counts_healthy_ones_and_the_newest_when_it_is_proven(
    proven: bool, left: list[int], folder: Path
) -> None:
    assert apply_retention(folder, Retention(keep=1), proven=proven) == []
    assert [step_of(path) for path in complete_checkpoints(folder)] == left
    assert [(folder / name).read_text() for name in (LATEST, BEST)] == ["step_00000003"] * 2


def test_a_run_that_was_never_healthy_keeps_its_newest_checkpoint(folder: Path) -> None:
    for path in complete_checkpoints(folder):
        edit(path / STATE, lambda content: content.update(healthy=False))
    assert apply_retention(folder, Retention(keep=2)) == []
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000005"]
    assert (folder / LATEST).read_text() == "step_00000005"
    assert not (folder / BEST).exists()


def test_who_asks_for_the_newest_gets_the_newest_healthy_one(byte_dataset: str, run: Path) -> None:
    edit(run / "checkpoints" / "step_00000010" / STATE, lambda content: content.update(healthy=False))
    assert load_model(run).source.name == "step_00000009"
    assert newest_step(run) == 9
    assert [entry.marks for entry in entries(run / "checkpoints")] == [("latest", "best", "unhealthy"), ()]
    assert read_document(run / "checkpoints" / "step_00000009")["healthy"] is True
