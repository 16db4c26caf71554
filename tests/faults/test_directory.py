"""What becomes of a run directory: taken away, cleaned up, continued, asked for a save or the end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.asking import (
    ENDLESS,
    recorded,
    save,
    stop,
    undeletable,
    waiting_orders,
    writers,
)
from tests.faults.conftest import Undisturbed
from tests.faults.runs import (
    ALONE,
    DP2,
    assert_nothing_left,
    assert_same_run,
    forked,
    outcome,
    saved_steps,
    steps,
    wait_for,
    words,
)
from tests.launching import (
    events,
    pretrain,
    tree,
)

pytestmark = pytest.mark.faults


def removed(run_dir: Path) -> str:
    """Files go before their folder: a run that looks meanwhile misses its lock."""
    shutil.rmtree(run_dir)
    return f"{re.escape(str(run_dir))}(/lock)? is gone: "


def renamed(run_dir: Path) -> str:
    run_dir.rename(run_dir.with_name("elsewhere"))
    return f"{re.escape(str(run_dir))} is gone: "


def replaced(run_dir: Path) -> str:
    run_dir.rename(run_dir.with_name("elsewhere"))
    run_dir.mkdir()
    (run_dir / "lock").touch()
    return f"{re.escape(str(run_dir / 'lock'))} is another file now: "


def unlocked(run_dir: Path) -> str:
    (run_dir / "lock").unlink()
    return f"{re.escape(str(run_dir / 'lock'))} is gone: "


@pytest.mark.parametrize("taken", [removed, renamed, replaced, unlocked])
def test_a_run_whose_directory_is_taken_away_fails_and_writes_nothing_there(
    taken: Callable[[Path], str], byte_dataset: str, tmp_path: Path
) -> None:
    """All ranks end; what stands there is somebody else's by now."""
    run_dir = tmp_path / "run"
    with forked(2, words(byte_dataset, run_dir, DP2, *ENDLESS), tmp_path) as run:
        save(run, run_dir, "checkpoint")
        sentence = taken(run_dir)
        before = tree(run_dir)
        assert run.results() == [(1, "")] * 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert re.match(sentence, last.partition("  ")[2]), last
    metrics = "metrics.jsonl"  # open all the time
    assert {**tree(run_dir), metrics: b""} == {**before, metrics: b""}
    assert_nothing_left(tmp_path)


def test_a_run_whose_directory_is_gone_at_its_last_step_is_not_made_anew(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = words(byte_dataset, run_dir, ALONE, "train.steps=4", "checkpoint.every=0")
    assert pretrain(1, arguments, plant=partial(remove_in_step, 4)) == [(1, "")]
    assert not run_dir.exists()


def remove_in_step(step: int) -> None:
    import megallama.train.loop

    train: Any = megallama.train.loop
    original, calls = train.train_step, []

    def watched(run: Any, *rest: Any) -> Any:
        calls.append(run)
        if len(calls) == step:
            shutil.rmtree(run.dir)
        return original(run, *rest)

    train.train_step = watched


def test_a_save_in_flight_makes_no_directory_anew(byte_dataset: str, tmp_path: Path) -> None:
    """It had begun when the directory went."""
    run_dir = tmp_path / "run"
    with forked(1, words(byte_dataset, run_dir, ALONE, *ENDLESS), tmp_path) as run:
        save(run, run_dir, "checkpoint")
        (writer,) = writers(run, tmp_path).values()
        os.kill(writer, signal.SIGSTOP)
        (run_dir / "SAVE").touch()
        wait_for(lambda: waiting_orders(writer) > 0, run)
        shutil.rmtree(run_dir)
        os.kill(writer, signal.SIGCONT)
        assert run.results() == [(1, "")]
    assert not run_dir.exists()


def test_checkpoints_that_are_removed_are_saved_again(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with forked(1, words(byte_dataset, run_dir, ALONE, *ENDLESS), tmp_path) as run:
        save(run, run_dir, "checkpoint")
        shutil.rmtree(run_dir / "checkpoints")
        save(run, run_dir, "checkpoint")
        stop(run_dir)
        assert run.results() == [(75, "")]
    assert saved_steps(run_dir) == steps(run_dir, "checkpoint")[1:]


def test_what_is_kept_is_the_newest_every_nth_and_the_best(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # A rate that ruins the model in the end: the best is one of the first.
    more = ["train.steps=13", "checkpoint.keep=2", "checkpoint.keep_every=5", "evaluation.every=1"]
    more += ["optimizer.lr=1", "schedule.kind=constant"]
    assert pretrain(1, words(byte_dataset, run_dir, ALONE, *more)) == [(0, "")]
    evaluated = [e for e in events(run_dir, "eval") if e["split"] == "validation" and e["step"] > 0]
    best = min(evaluated, key=lambda event: event["loss"])["step"]
    assert best not in (5, 10, 12, 13)
    assert saved_steps(run_dir) == sorted({5, 10, 12, 13, best})
    assert (run_dir / "checkpoints" / "best").read_text() == f"step_{best:08d}"


def test_a_start_keeps_the_promise_that_a_killed_one_could_not(byte_dataset: str, tmp_path: Path) -> None:
    """Killed behind its last save: what was to be deleted is there, `latest` names another, nothing is left to save."""
    run_dir = tmp_path / "run"
    arguments = words(byte_dataset, run_dir, ALONE, "train.steps=4")
    assert pretrain(1, [*arguments, "checkpoint.keep=3"]) == [(0, "")]
    (run_dir / "checkpoints" / "latest").write_text("step_00000003")
    assert pretrain(1, [*arguments, "checkpoint.keep=1"]) == [(0, "")]
    assert saved_steps(run_dir) == [4]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000004"


def test_a_checkpoint_that_cannot_be_deleted_is_said_and_the_run_goes_on(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with forked(1, words(byte_dataset, run_dir, ALONE, *ENDLESS, "checkpoint.keep=1"), tmp_path) as run:
        save(run, run_dir, "checkpoint")
        (old,) = (run_dir / "checkpoints").glob("step_*")
        with undeletable(old / "state.json"):
            save(run, run_dir, "checkpoint")
            save(run, run_dir, "checkpoint")
            stop(run_dir)
            assert run.results() == [(75, "")]
            (notice,) = {event["text"] for event in events(run_dir, "notice")}
            assert "state.json: " in notice
            assert saved_steps(run_dir) == steps(run_dir, "checkpoint")[-1:]
            assert [path.name for path in (run_dir / "checkpoints").glob("*.dropped")] == [f"{old.name}.dropped"]
    last = steps(run_dir, "checkpoint")[-1]
    assert pretrain(1, words(byte_dataset, run_dir, ALONE, f"train.steps={last + 1}", "checkpoint.keep=1")) == [(0, "")]
    assert list((run_dir / "checkpoints").glob("*.dropped")) == []


def test_what_a_start_left_unfinished_is_set_aside_and_in_nobodys_way(
    byte_dataset: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run_dir, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    arguments = words(byte_dataset, run_dir, ALONE, "train.steps=24")
    assert pretrain(1, [*arguments, "train.stop_after=3"]) == [(0, "")]
    left = {
        "step_00000004.torn-1": b"of the start before the last",
        "step_00000004.partial-0123abcd": b"of the last start",
        "step_00000004.partial-4567cdef": b"of another",
        "step_00000002.dropped": b"half deleted",
        "step_00000005": b"has no manifest",
    }
    for name, content in left.items():
        (folder / name).mkdir()
        (folder / name / "rank_00000.bin").write_bytes(content)
    assert pretrain(1, arguments) == [(0, "")]
    assert steps(run_dir, "resume") == [3]
    now = {path.parent.name: path.read_bytes() for path in folder.glob("*.*/rank_00000.bin")}
    assert now == {
        "step_00000004.torn-1": b"of the start before the last",
        "step_00000004.torn-2": b"of the last start",
        "step_00000004.torn-3": b"of another",
        "step_00000005.torn-1": b"has no manifest",
    }
    notices = " ".join(event["text"] for event in events(run_dir, "notice"))
    assert all(name in notices for name in left.keys() - {"step_00000004.torn-1"})
    assert_same_run(run_dir, undisturbed(ALONE, 24))


def test_a_line_of_metrics_that_was_cut_off_is_the_only_one_lost(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = words(byte_dataset, run_dir, ALONE, "train.steps=4")
    assert pretrain(1, [*arguments, "train.stop_after=1"]) == [(0, "")]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "ste')
    assert pretrain(1, arguments) == [(0, "")]
    assert steps(run_dir, "train") == [1, 2, 3, 4]


def test_a_file_asks_for_a_save_or_for_the_end_and_one_from_before_does_not(
    byte_dataset: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    stop(run_dir)
    a_minute_ago = time.time() - 60  # what is no older than the process, to a hundredth of a second, is meant for it
    os.utime(run_dir / "STOP", (a_minute_ago, a_minute_ago))
    arguments = words(byte_dataset, run_dir, DP2, "train.steps=24", "checkpoint.every=0")
    with forked(2, arguments, tmp_path, plant=wait_to_be_asked) as run:
        assert wait_for(lambda: recorded(run_dir, "train"), run)
        assert not (run_dir / "STOP").exists()
        (run_dir / "SAVE").touch()
        assert wait_for((run_dir / "checkpoints" / "latest").exists, run)
        stop(run_dir)
        assert run.results() == [(75, "")] * 2
    assert not (run_dir / "STOP").exists() and not (run_dir / "SAVE").exists()
    said = outcome(run_dir)
    assert (said["status"], said["reason"]) == ("requeue", "stopped by the file STOP")
    assert len(steps(run_dir, "checkpoint")) == 2
    assert saved_steps(run_dir)[-1] == said["step"] < 24
    assert pretrain(2, arguments) == [(0, "")] * 2
    assert steps(run_dir, "resume") == [said["step"]]
    assert_same_run(run_dir, undisturbed(DP2, 24))


def wait_to_be_asked() -> None:
    """Step 2 waits for the file SAVE and step 6 for STOP, or all steps may be done before they come."""
    import megallama.train.loop

    train: Any = megallama.train.loop
    original, calls = train.train_step, []

    def watched(run: Any, *rest: Any) -> Any:
        calls.append(run)
        asked = {2: "SAVE", 6: "STOP"}.get(len(calls))
        if run.mesh.rank == 0 and asked is not None:
            wait_for((run.dir / asked).exists)
        return original(run, *rest)

    train.train_step = watched


def test_an_evaluation_that_a_stop_cut_off_is_done_by_the_next_start(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = words(byte_dataset, run_dir, ALONE, "train.steps=6", "evaluation.every=2", "checkpoint.keep=9")
    assert pretrain(1, arguments, plant=partial(stop_in_step, 4)) == [(75, "")]
    assert sorted(set(steps(run_dir, "eval"))) == [0, 2]
    assert pretrain(1, arguments) == [(0, "")]
    assert [step for step in steps(run_dir, "eval") if step == 4] == [4, 4], "once on each of the two splits"
    assert sorted(set(steps(run_dir, "eval"))) == [0, 2, 4, 6]


def stop_in_step(step: int) -> None:
    """Somebody asks for the end during `step`."""
    import megallama.train.loop

    train: Any = megallama.train.loop
    original, calls = train.train_step, []

    def watched(run: Any, *rest: Any) -> Any:
        calls.append(run)
        if len(calls) == step:
            stop(run.dir)
        return original(run, *rest)

    train.train_step = watched


@pytest.mark.parametrize("between", ["steps", "evaluations"])
def test_a_run_leaves_in_time(between: str, byte_dataset: str, tmp_path: Path) -> None:
    """Also where an evaluation takes much longer than a step."""
    run_dir, minutes = tmp_path / "run", 0.1
    evaluations = ["evaluation.every=3", "evaluation.samples=200"] if between == "evaluations" else []
    arguments = words(byte_dataset, run_dir, ALONE, *ENDLESS, *evaluations, f"train.max_minutes={minutes}")
    began = time.time()
    assert pretrain(1, arguments) == [(75, "")]
    said = outcome(run_dir)
    assert (said["status"], said["reason"]) == ("requeue", "stopped by train.max_minutes")
    assert saved_steps(run_dir) == [said["step"]] == steps(run_dir, "checkpoint")
    opened = (run_dir / "environment.json").stat().st_mtime
    assert began < opened
    assert 0.5 * 60 * minutes < said["time"] - began  # the start counts, however long it takes
    assert said["time"] - opened < 60 * minutes + 0.5
