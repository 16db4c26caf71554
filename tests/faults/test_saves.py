"""Saves that fail: disks that are full or broken, writers that die, a rank that cannot write."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from megallama.parallel.spawn import RankFailedError
from tests.faults.asking import (
    ENDLESS,
    MAY_MOUNT,
    SMALL_FILE,
    ended,
    limited,
    recorded,
    save,
    stop,
    trains,
    waiting_orders,
    writers,
)
from tests.faults.runs import (
    ALONE,
    DP2,
    Layout,
    assert_nothing_left,
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
    ROOT,
    clean_environment,
    events,
    outliving,
    processes_of,
)

pytestmark = pytest.mark.faults


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
        wait_for(lambda: ended(after[rank]), run)  # one that is still dying takes an order, and the save with it
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


PP2_1F1B = Layout(2, ("parallel.pipeline=2",))
