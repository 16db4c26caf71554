"""Ranks that fail, hang or differ: gradients on one of them, a second start, one that stands still."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import pickle
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.asking import (
    ENDLESS,
    recorded,
    save,
    stop,
)
from tests.faults.conftest import Undisturbed
from tests.faults.runs import (
    ALONE,
    DP2,
    PP2,
    TP2,
    Forked,
    Layout,
    assert_nothing_left,
    cold,
    command,
    forked,
    outcome,
    saved_steps,
    steps,
    wait_for,
    words,
)
from tests.launching import (
    PRETRAIN,
    execute,
    losses,
    outliving,
    pretrain,
)

pytestmark = pytest.mark.faults


PP2_1F1B = Layout(2, ("parallel.pipeline=2",))
POISONED = {
    **{f"{name} rank {rank}": (layout, rank) for name, layout in (("dp2", DP2), ("tp2", TP2)) for rank in (0, 1)},
    **{f"1f1b stage {rank}": (PP2_1F1B, rank) for rank in (0, 1)},
    "dualpipev rank 1": (PP2, 1),
}


@pytest.mark.parametrize("name", POISONED)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    name: str, byte_dataset: str, tmp_path: Path
) -> None:
    layout, rank = POISONED[name]
    run_dir, hashes = tmp_path / "run", tmp_path / "hashes"
    arguments = words(byte_dataset, run_dir, layout, "train.steps=4")
    plant = partial(poison, rank, (2,), hashes)
    assert pretrain(layout.world_size, arguments, plant=plant) == [(0, "")] * layout.world_size
    assert steps(run_dir, "skip") == [2]
    for path in (hashes.with_suffix(f".{rank}") for rank in range(layout.world_size)):
        changed = [before != after for before, after in json.loads(path.read_text())]
        assert changed == [True, False, True, True], f"weights and moments rest in step 2 alone: {path.name}"
    assert all(map(math.isfinite, losses(run_dir)))
    assert saved_steps(run_dir) == [3, 4]
    state = json.loads((run_dir / "checkpoints" / "step_00000004" / "state.json").read_text())["state"]
    assert (state["step"], state["updates"]) == (4, 3)


def test_steps_that_are_skipped_again_and_again_end_the_run_with_a_diagnosis(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = words(byte_dataset, run_dir, DP2, *ENDLESS, "train.max_skipped=3")
    plant = partial(poison, 1, (2, 4, 5, 6), tmp_path / "hashes")
    assert pretrain(2, arguments, plant=plant) == [(1, "")] * 2
    assert steps(run_dir, "skip") == [2, 4, 5, 6]
    said = outcome(run_dir)
    assert (said["status"], said["step"]) == ("failed", 6)
    assert said["reason"].startswith(f"3 steps in a row were skipped, see {run_dir}/diagnosis.txt; try a lower ")
    page = (run_dir / "diagnosis.txt").read_text()
    assert page.startswith("Steps 4 to 6 were skipped.\n\nstep 4: a gradient that is not finite; loss ")
    assert "the output of every layer and the gradient there are finite" in page  # it was one weight's


def poison(rank: int, poisoned: tuple[int, ...], hashes: Path) -> None:
    """One gradient of `rank` is NaN in the steps `poisoned`; each rank writes down its state around every step."""
    import megallama.train.loop

    train: Any = megallama.train.loop
    original, seen = train.train_step, list[tuple[str, str]]()

    def watched(run: Any, *rest: Any) -> Any:
        forward_backward = run.engine.forward_backward
        first, *_ = run.model.parameters()
        if run.mesh.rank == rank and len(seen) + 1 in poisoned:
            handle = first.register_hook(lambda gradient: gradient * math.nan)

            def with_nan(*arguments: Any) -> Any:
                loss = forward_backward(*arguments)
                handle.remove()
                if first.grad is not None:  # a split backward calls no hook
                    first.grad.fill_(math.nan)
                return loss

            run.engine.forward_backward = with_nan
        before = state_hash(run)
        result = original(run, *rest)
        run.engine.forward_backward = forward_backward
        seen.append((before, state_hash(run)))
        hashes.with_suffix(f".{run.mesh.rank}").write_text(json.dumps(seen))
        return result

    train.train_step = watched


def state_hash(run: Any) -> str:
    """Of this rank's weights, masters and moments, all of which must be finite."""
    digest = hashlib.sha256()
    held = [tensor for f in run.engine.fragments() for tensor in (f.master, *f.moments.values())]
    for tensor in [*run.model.parameters(), *held]:
        assert torch.isfinite(tensor).all()
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def test_a_second_start_is_refused_and_the_first_does_not_notice(
    byte_dataset: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run_dir, second = tmp_path / "run", tmp_path / "second"
    second.mkdir()
    with forked(2, words(byte_dataset, run_dir, DP2, *ENDLESS), tmp_path) as run:
        save(run, run_dir, "checkpoint")
        settings, said = (run_dir / "config.yaml").read_bytes(), outcome(run_dir)
        again = execute([sys.executable, PRETRAIN, *words(byte_dataset, run_dir, ALONE)], second)
        ranks = pretrain(2, words(byte_dataset, run_dir, DP2))
        assert ((run_dir / "config.yaml").read_bytes(), outcome(run_dir)) == (settings, said)
        save(run, run_dir, "checkpoint")
        stop(run_dir)
        assert run.results() == [(75, "")] * 2
        holder = run.ranks()[0]
    assert (again.code, len(again.sentences)) == (2, 1)
    assert f"run.dir={run_dir} is in use by process {holder} on " in again.sentences[0]
    assert "Traceback" not in again.err
    assert [code for code, _ in ranks] == [2, 2]
    assert len(steps(run_dir, "train")) == steps(run_dir, "train")[-1], "nobody else wrote a line"


def test_a_lock_that_nobody_holds_is_no_obstacle(byte_dataset: str, tmp_path: Path) -> None:
    """One that was taken for held would be waited for in vain, and the start be refused."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    # Process 1 is alive and has nothing to do with it: what counts is who holds the lock.
    (run_dir / "lock").write_text('{"host": "elsewhere", "pid": 1, "job": "17"}')
    assert pretrain(1, words(byte_dataset, run_dir, ALONE, "train.steps=4")) == [(0, "")]
    assert "elsewhere" not in (run_dir / "lock").read_text()


def test_what_the_holder_of_the_lock_saved_last_is_continued(byte_dataset: str, tmp_path: Path) -> None:
    """A start that found no checkpoint, and had to wait, looks again."""
    run_dir, kept = tmp_path / "run", tmp_path / "kept"
    arguments = words(byte_dataset, run_dir, DP2, "train.steps=4")
    assert pretrain(2, [*arguments, "train.stop_after=3"]) == [(0, "")] * 2
    (run_dir / "checkpoints").rename(kept)
    with (run_dir / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with forked(2, arguments, tmp_path) as run:
            wait_for(lambda: waits_for(run_dir / "lock", run), run)
            kept.rename(run_dir / "checkpoints")
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert run.results() == [(0, "")] * 2
    assert steps(run_dir, "resume") == [3]
    assert steps(run_dir, "train") == [1, 2, 3, 4]


def waits_for(lock: Path, run: Forked) -> bool:
    """Whether rank 0 has the file open."""
    try:
        return lock in [path.readlink() for path in Path(f"/proc/{run.ranks()[0]}/fd").iterdir()]
    except (OSError, KeyError):
        return False


WATCHFUL = ["watchdog.factor=2", "watchdog.least_seconds=4", "watchdog.first_seconds=12"]


PLACES = {
    "train_step": "in train_step",
    "write_train_event": "in train_step",
    "evaluate_splits": "in evaluate_splits",
    "save_checkpoint": "in save_checkpoint",
    "finish": "in finish",
}


"""Where a rank is stopped, and where the others are then found."""


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_stands_still_is_noticed_wherever_it_does(place: str, byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    layout = Layout(3, ("train.micro_batch_size=2", "train.global_batch_size=6"))
    arguments = words(byte_dataset, run_dir, layout, "train.steps=6", "checkpoint.every=2", "evaluation.every=4")
    with forked(3, [*arguments, *WATCHFUL], tmp_path, plant=partial(stand_still, place, str(tmp_path))) as run:
        wait_for((tmp_path / "stopped").exists, run)
        began = time.monotonic()
        wait_for(run.over, timeout=40)
        assert time.monotonic() - began < 30
    stacks = {path.name: path.read_text() for path in (run_dir / "stacks").glob("*.txt")}
    assert stacks.keys() == {"rank_00000.txt", "rank_00002.txt"}
    for text in stacks.values():
        assert " hangs: " in text.splitlines()[0]
        assert PLACES[place] in text
    for rank in (0, 2):
        recording = pickle.loads((run_dir / "stacks" / f"collectives_rank_{rank:05d}").read_bytes())
        begun = [entry for entry in recording["entries"] if not entry["retired"]]
        asked = [f"in {frame['name']}" for entry in begun for frame in entry["frames"]]
        waits = "in _save" if place == "finish" else PLACES[place]
        assert waits in asked, "for the collective that the stopped rank is not in"
    said = outcome(run_dir)
    assert said["status"] == "failed"
    assert " hangs: " in said["reason"]
    assert_nothing_left(tmp_path)


def stand_still(place: str, folder: str) -> None:
    """Rank 1 is stopped, by the signal that cannot be caught, where it comes to `place` for the third time."""
    import megallama.train.loop
    from megallama.checkpoint.writing.saver import Saver

    rank, name = int(os.environ["RANK"]), place
    owner: Any = megallama.train.loop
    if place == "finish":  # the third save, for which the others wait there, may be done before rank 1 comes to it
        owner, name = Saver, "_save"
    original, calls = getattr(owner, name), []

    def stopped(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if rank == 1 and len(calls) == 3:
            Path(folder, "stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*arguments, **named)

    setattr(owner, name, stopped)


def test_a_hang_under_torchrun_ends_the_job(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with cold([*command("torchrun", 2), *words(byte_dataset, run_dir, TP2, *ENDLESS, *WATCHFUL)], tmp_path) as run:
        wait_for(lambda: recorded(run_dir, "train"), run)
        os.kill(run.ranks()[1], signal.SIGSTOP)
        # Limit and grace, and the half minute that torchrun gives to a rank that does not go.
        assert run.process.wait(110) != 0
        assert outliving(tmp_path) == []
    assert outcome(run_dir)["status"] == "failed"
    assert outcome(run_dir)["step"] >= 1
    assert "most recent call first" in (run_dir / "stacks" / "rank_00000.txt").read_text()
