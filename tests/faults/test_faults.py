"""What goes wrong while a run runs, on one rank: every rank does the same about it, and the run is not lost."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch

from megallama.parallel.spawn import RankFailedError
from tests.faults.conftest import Undisturbed
from tests.faults.runs import (
    ALONE,
    DP2,
    PP2,
    TP2,
    Forked,
    Layout,
    Running,
    assert_nothing_left,
    assert_same_run,
    cold,
    command,
    forked,
    outcome,
    partial_saves,
    saved_steps,
    steps,
    wait_for,
    words,
)
from tests.launching import (
    PRETRAIN,
    ROOT,
    clean_environment,
    events,
    execute,
    losses,
    outliving,
    pretrain,
    processes_of,
    tree,
)

pytestmark = pytest.mark.faults

ENDLESS = ["train.steps=100000", "checkpoint.every=0"]
"""Until somebody says stop; saves when somebody says save."""
MAY_MOUNT = subprocess.run(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL).returncode == 0
SMALL_FILE = 1000
"""Bytes."""


# --- saves that fail


def test_a_save_that_one_rank_cannot_write_is_dropped_by_all(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with forked(2, words(byte_dataset, run_dir, DP2, *ENDLESS), tmp_path) as run:
        save(run, run_dir, "checkpoint")
        with limited(writers(run, tmp_path)[1]):
            save(run, run_dir, "checkpoint_failed")
            trained = len(steps(run_dir, "train"))
            wait_for(lambda: len(steps(run_dir, "train")) > trained + 3, run)
        assert partial_saves(run_dir) == set()
        save(run, run_dir, "checkpoint")
        stop(run_dir)
        assert run.results() == [(75, "")] * 2
    (failed,) = events(run_dir, "checkpoint_failed")
    assert failed["reason"].startswith("rank 1: ") and failed["reason"].endswith("rank_00001.bin: File too large")
    assert failed["failures"] == 1
    first, second, last = steps(run_dir, "checkpoint")
    assert first < failed["step"] < second < last == outcome(run_dir)["step"]
    assert saved_steps(run_dir) == [second, last]
    assert_nothing_left(tmp_path)


@pytest.mark.skipif(not MAY_MOUNT, reason="this user may not mount a small disk")
def test_a_disk_that_is_full_costs_saves_and_not_the_run(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    mount = f'mount -t tmpfs -o size=16m none {run_dir}/checkpoints && exec "$@"'
    start = ["unshare", "-rm", "sh", "-c", mount, "sh", *command("python", 1)]
    with cold([*start, *words(byte_dataset, run_dir, ALONE, *ENDLESS)], tmp_path) as run:
        save(run, run_dir, "checkpoint")
        seen = Path(f"/proc/{run.process.pid}/root{run_dir}")  # the disk is there for the run alone
        with suppress(OSError), (seen / "checkpoints" / "other data").open("wb", buffering=0) as other:
            while True:
                other.write(bytes(1 << 16))
        save(run, run_dir, "checkpoint_failed")
        assert partial_saves(seen) == set()
        (seen / "checkpoints" / "other data").unlink()
        save(run, run_dir, "checkpoint")
        assert saved_steps(seen) == steps(run_dir, "checkpoint")
        stop(run_dir)
        assert run.process.wait(60) == 75
    (failed,) = events(run_dir, "checkpoint_failed")
    assert failed["reason"].endswith("rank_00000.bin: No space left on device")


@pytest.mark.skipif(not MAY_MOUNT, reason="this user may not mount a small disk")
def test_a_disk_that_fills_at_the_end_has_room_for_the_outcome(byte_dataset: str, tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "outcome.json"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=16m none {disk} && "$@"; code=$?; cp {disk}/run/outcome.json {kept}; exit $code'
    start = ["unshare", "-rm", "sh", "-c", mount, "sh", *command("python", 1)]
    with cold([*start, *words(byte_dataset, disk / "run", ALONE, *ENDLESS)], tmp_path) as run:
        wait_for(lambda: any(trains(pid, disk / "run") for pid in processes_of(tmp_path)), run)
        rank = next(pid for pid in processes_of(tmp_path) if trains(pid, disk / "run"))
        seen = Path(f"/proc/{rank}/root{disk}")
        with suppress(OSError), (seen / "other data").open("wb", buffering=0) as other:
            while True:
                other.write(bytes(1 << 10))
        os.kill(rank, signal.SIGTERM)
        assert run.process.wait(60) == 1, run.errors()
    said = json.loads(kept.read_text())
    assert (said["status"], said["reason"][:21]) == ("failed", "the last save failed:")
    assert said["step"] >= 1


def test_a_save_that_cannot_be_committed_is_dropped_by_all(byte_dataset: str, tmp_path: Path) -> None:
    """All ranks have written; at the name that the checkpoint would have is one that a newer version made."""
    run_dir, taken = tmp_path / "run", 4
    more = ["train.steps=6", "checkpoint.every=2"]
    with forked(2, words(byte_dataset, run_dir, DP2, *more), tmp_path, plant=partial(put_in_the_way, taken)) as run:
        assert run.results() == [(0, "")] * 2
    (failed,) = events(run_dir, "checkpoint_failed")
    assert failed["step"] == taken
    assert failed["reason"].startswith("rank 0: ") and failed["reason"].endswith("File exists")
    assert partial_saves(run_dir) == set()
    assert steps(run_dir, "checkpoint") == [2, 6]
    in_the_way = run_dir / "checkpoints" / f"step_{taken:08d}"
    assert [path.name for path in in_the_way.iterdir()] == ["manifest.json"]


def put_in_the_way(step: int) -> None:
    """At the third step, since a start would refuse it."""
    import megallama.train.loop

    train: Any = megallama.train.loop
    original, calls = train.train_step, []

    def watched(run: Any, *rest: Any) -> Any:
        calls.append(run)
        if len(calls) == 3:
            folder = run.dir / "checkpoints" / f"step_{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").write_text('{"format": 2, "content": {}, "sha256": ""}')
        return original(run, *rest)

    train.train_step = watched


def test_the_save_in_flight_is_not_lost_when_a_rank_fails(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = words(byte_dataset, run_dir, DP2, *ENDLESS, "checkpoint.every=4")
    with (
        forked(2, arguments, tmp_path, plant=partial(fail_behind_a_save, 4)) as run,
        pytest.raises(RankFailedError, match="planted"),
    ):
        run.results()
    assert saved_steps(run_dir) == [4]
    assert outcome(run_dir)["reason"].endswith("RuntimeError: planted")
    assert outcome(run_dir)["step"] == 4


def fail_behind_a_save(step: int) -> None:
    """Rank 1 raises in the step after `step`, while the disk of its save stands still for a second."""
    import megallama.train.loop

    train: Any = megallama.train.loop
    original, calls = train.train_step, []

    def watched(run: Any, *rest: Any) -> Any:
        calls.append(run)
        writer = run.saver._writer.pid
        if run.mesh.rank == 1 and len(calls) == step:
            os.kill(writer, signal.SIGSTOP)
        if run.mesh.rank == 1 and len(calls) == step + 1:
            assert run.saver.busy
            Timer(1.0, os.kill, (writer, signal.SIGCONT)).start()
            raise RuntimeError("planted")
        return original(run, *rest)

    train.train_step = watched


def test_a_log_that_nobody_reads_any_more_ends_no_run(byte_dataset: str, tmp_path: Path) -> None:
    """As where the connection to the node is lost that started it."""
    run_dir = tmp_path / "run"
    start = [*command("python", 1), *words(byte_dataset, run_dir, ALONE, "train.steps=12")]
    environment = clean_environment(tmp_path, OMP_NUM_THREADS="1")
    with subprocess.Popen(start, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        while b"step" not in process.stdout.readline():
            pass
        process.stdout.close()
        assert process.wait(60) == 0, process.stderr.read()
        assert process.stderr.read() == b""
    assert outcome(run_dir)["status"] == "done"
    assert steps(run_dir, "train") == list(range(1, 13))


@pytest.mark.parametrize("rank", [0, 1])
def test_saves_that_fail_again_and_again_end_the_run_on_every_rank(
    rank: int, byte_dataset: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with forked(2, words(byte_dataset, run_dir, DP2, *ENDLESS, "checkpoint.every=2"), tmp_path) as run:
        wait_for(lambda: recorded(run_dir, "checkpoint"), run)
        resource.prlimit(writers(run, tmp_path)[rank], resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))
        assert run.results() == [(1, "")] * 2
    said = outcome(run_dir)
    assert said["status"] == "failed"
    assert said["reason"].startswith(f"3 saves in a row failed: rank {rank}: ")
    assert [event["failures"] for event in events(run_dir, "checkpoint_failed")][:3] == [1, 2, 3]
    assert saved_steps(run_dir) == steps(run_dir, "checkpoint")[-2:]
    assert partial_saves(run_dir) == set()


def test_a_run_that_cannot_save_says_so_in_one_sentence(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = [*ENDLESS, "checkpoint.every=1", "checkpoint.max_failures=2"]
    with cold([*command("python", 1), *words(byte_dataset, run_dir, ALONE, *more)], tmp_path) as run:
        wait_for(lambda: recorded(run_dir, "checkpoint"), run)
        (writer,) = (pid for pid in processes_of(tmp_path) if pid != run.process.pid)
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))
        assert run.process.wait(60) == 1
        assert outliving(tmp_path) == []
    said = outcome(run_dir)
    assert (said["status"], said["reason"][:50]) == ("failed", f"2 saves in a row failed: rank 0: {run_dir}"[:50])
    printed = (tmp_path / "out.log").read_text()
    assert f"step {said['step']}  {said['reason']}\n" in printed
    assert "Traceback" not in printed + run.errors()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_writer_that_is_killed_costs_one_save_and_is_started_again(
    rank: int, byte_dataset: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with forked(2, words(byte_dataset, run_dir, DP2, *ENDLESS), tmp_path) as run:
        save(run, run_dir, "checkpoint")
        before = writers(run, tmp_path)
        os.kill(before[rank], signal.SIGSTOP)
        (run_dir / "SAVE").touch()
        wait_for(lambda: partial_saves(run_dir), run)  # the other rank's file
        wait_for(lambda: waiting_orders(before[rank]), run)  # killed before it has its order, it would cost no save
        os.kill(before[rank], signal.SIGKILL)
        wait_for(lambda: recorded(run_dir, "checkpoint_failed"), run)
        assert partial_saves(run_dir) == set()
        save(run, run_dir, "checkpoint")
        after = writers(run, tmp_path)
        assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in after.values()] == [10, 10], "training goes first"
        assert after[1 - rank] == before[1 - rank] and after[rank] != before[rank]
        os.kill(after[rank], signal.SIGKILL)  # between two saves: costs none
        save(run, run_dir, "checkpoint")
        stop(run_dir)
        assert run.results() == [(75, "")] * 2
    (failed,) = events(run_dir, "checkpoint_failed")
    assert failed["reason"] == f"rank {rank}: the writing process is gone (exit code -9)"
    assert saved_steps(run_dir) == steps(run_dir, "checkpoint")[-2:]
    assert_nothing_left(tmp_path)


def test_an_older_checkpoint_that_is_damaged_does_not_keep_newer_ones_from_being_saved(
    byte_dataset: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with forked(1, words(byte_dataset, run_dir, ALONE, *ENDLESS), tmp_path) as run:
        save(run, run_dir, "checkpoint")
        (state,) = (run_dir / "checkpoints").glob("step_*/state.json")
        state.write_bytes(b"?" + state.read_bytes()[1:])
        save(run, run_dir, "checkpoint")
        save(run, run_dir, "checkpoint")
        stop(run_dir)
        assert run.results() == [(75, "")]
    assert steps(run_dir, "checkpoint_failed") == []
    assert saved_steps(run_dir) == steps(run_dir, "checkpoint")[-2:]


# --- gradients that are not finite

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
    assert said["reason"].startswith("3 steps in a row had a gradient that is not finite; try ")


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
    held = [tensor for f in run.engine.fragments() for tensor in (f.master, f.exp_avg, f.exp_avg_sq)]
    for tensor in [*run.model.parameters(), *held]:
        assert torch.isfinite(tensor).all()
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


# --- one run directory, one run


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
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    # Process 1 is alive and has nothing to do with it: what counts is who holds the lock.
    (run_dir / "lock").write_text('{"host": "elsewhere", "pid": 1, "job": "17"}')
    began = time.monotonic()
    assert pretrain(1, words(byte_dataset, run_dir, ALONE, "train.steps=4")) == [(0, "")]
    assert time.monotonic() - began < 10
    assert "elsewhere" not in (run_dir / "lock").read_text()


def test_what_the_holder_of_the_lock_saved_last_is_continued(byte_dataset: str, tmp_path: Path) -> None:
    """A start that found no checkpoint, and had to wait, looks again."""
    run_dir, kept = tmp_path / "run", tmp_path / "kept"
    arguments = words(byte_dataset, run_dir, DP2, "train.steps=4")
    assert pretrain(2, [*arguments, "train.stop_after=3"]) == [(0, "")] * 2
    (run_dir / "checkpoints").rename(kept)
    with (run_dir / "lock").open("a") as lock, forked(2, arguments, tmp_path) as run:
        fcntl.flock(lock, fcntl.LOCK_EX)
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


# --- hangs

WATCHFUL = ["watchdog.factor=2", "watchdog.least_seconds=4", "watchdog.first_seconds=12"]
PLACES = {
    "train_step": "in train_step",
    "requests.agree": "in agree",
    "write_train_event": "in write_train_event",
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
    stacks = {path.name: path.read_text() for path in (run_dir / "stacks").iterdir()}
    assert stacks.keys() == {"rank_00000.txt", "rank_00002.txt"}
    for text in stacks.values():
        assert " hangs: " in text.splitlines()[0]
        assert PLACES[place] in text
    said = outcome(run_dir)
    assert said["status"] == "failed"
    assert " hangs: " in said["reason"]
    assert_nothing_left(tmp_path)


def stand_still(place: str, folder: str) -> None:
    """Rank 1 is stopped, by the signal that cannot be caught, in step 3 or where it comes to `place` after that."""
    import megallama.train.loop
    from megallama.train.stop_requests import StopRequests

    rank = int(os.environ["RANK"])
    owner: Any = StopRequests if place == "requests.agree" else megallama.train.loop
    name = place.split(".")[-1]
    original, calls = getattr(owner, name), []

    def stopped(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if rank == 1 and (len(calls) == 3 or name == "finish"):
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
        assert run.process.wait(60) != 0
        assert outliving(tmp_path) == []
    assert outcome(run_dir)["status"] == "failed"
    assert outcome(run_dir)["step"] >= 1
    assert "most recent call first" in (run_dir / "stacks" / "rank_00000.txt").read_text()


# --- what is taken away from it


def removed(run_dir: Path) -> str:
    shutil.rmtree(run_dir)
    return f"{run_dir} is gone: "


def renamed(run_dir: Path) -> str:
    run_dir.rename(run_dir.with_name("elsewhere"))
    return f"{run_dir} is gone: "


def replaced(run_dir: Path) -> str:
    run_dir.rename(run_dir.with_name("elsewhere"))
    run_dir.mkdir()
    (run_dir / "lock").touch()
    return f"{run_dir / 'lock'} is another file now: "


def unlocked(run_dir: Path) -> str:
    (run_dir / "lock").unlink()
    return f"{run_dir / 'lock'} is gone: "


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
    assert last.partition("  ")[2].startswith(sentence), last
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


# --- what is kept, what is left over


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


# --- files and the clock


def test_a_file_asks_for_a_save_or_for_the_end_and_one_from_before_does_not(
    byte_dataset: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    arguments = words(byte_dataset, run_dir, DP2, "train.steps=24", "checkpoint.every=0")
    with forked(2, arguments, tmp_path) as run:
        wait_for(lambda: recorded(run_dir, "train"), run)
        assert not (run_dir / "STOP").exists()
        (run_dir / "SAVE").touch()
        wait_for(lambda: recorded(run_dir, "checkpoint"), run)
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
    assert 0.5 * 60 * minutes < said["time"] - opened < 60 * minutes + 0.5


# --- what the tests do to a run


def save(run: Running, run_dir: Path, kind: str) -> None:
    """Ask for a save and wait for an event of that kind, which says how it went."""
    wait_for(lambda: recorded(run_dir, "train"), run)
    before = len(steps(run_dir, kind))
    (run_dir / "SAVE").touch()
    assert wait_for(lambda: len(steps(run_dir, kind)) > before, run), "the run has ended"


def stop(run_dir: Path) -> None:
    (run_dir / "STOP").touch()


def trains(pid: int, run_dir: Path) -> bool:
    """Whether the process is a rank that has trained a step, on a disk that it may see alone."""
    try:
        started = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:2] == [PRETRAIN.encode()]
        return started and b'"train"' in Path(f"/proc/{pid}/root{run_dir}/metrics.jsonl").read_bytes()
    except OSError:
        return False


def recorded(run_dir: Path, kind: str) -> bool:
    return (run_dir / "metrics.jsonl").exists() and bool(steps(run_dir, kind))


def writers(run: Forked, home: Path) -> dict[int, int]:
    """The process that writes, of each rank."""
    ranks, found = {pid: rank for rank, pid in run.ranks().items()}, {}
    for pid in processes_of(home):
        with suppress(OSError):
            if b"megallama.checkpoint.writing.writer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                found[ranks[parent]] = pid
    return found


def waiting_orders(pid: int) -> int:
    """Bytes on the input of a writing process that it has not read."""
    with Path(f"/proc/{pid}/fd/0").open("rb", buffering=0) as pipe:
        (count,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))
    return int(count)


@contextmanager
def limited(pid: int) -> Iterator[None]:
    """The process can write no file beyond a small size, as if its disk were full."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def undeletable(path: Path) -> Iterator[None]:
    """A file that nobody can delete, root neither."""
    root = os.geteuid() == 0
    descriptor = os.open(path if root else path.parent, os.O_RDONLY)
    if not root:
        os.fchmod(descriptor, 0o500)
    elif not set_immutable(descriptor, True):
        pytest.skip("root can delete anything on this file system")
    try:
        yield
    finally:
        if root:
            set_immutable(descriptor, False)
        else:
            os.fchmod(descriptor, 0o700)
        os.close(descriptor)


def set_immutable(descriptor: int, immutable: bool) -> bool:
    """As chattr does; False where the file system knows no such flag."""
    get_flags, set_flags, immutable_flag = 0x80086601, 0x40086602, 0x10
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(descriptor, get_flags, struct.pack("l", 0)))
        flags = flags | immutable_flag if immutable else flags & ~immutable_flag
        fcntl.ioctl(descriptor, set_flags, struct.pack("l", flags))
    except OSError:
        return False
    return True
