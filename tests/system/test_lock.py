"""One writer at a time: whoever comes second is refused in a sentence, and the dead hold nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megallama.cli import app
from megallama.cluster.cli import send
from megallama.corpus.building.build import build_dataset
from megallama.corpus.train_tokenizer import train_tokenizer
from megallama.data.indexed import open_indexed
from megallama.errors import UserError
from megallama.system.lock import LOCK, Lock, Place, RunLock, beside, output_lock
from megallama.text.tokenizer import load_tokenizer
from tests.launching import ROOT, without_progress
from tests.plan.test_calibrate import made_run

MEGALLAMA = "from megallama.cli import main; main()"
# Stands still as soon as it has written something to X.bin: a signal from outside might come when it has ended.
HALTING = """
import os, signal
from megallama.cli import main
from megallama.data.indexed import IndexedWriter

copy = IndexedWriter.copy

def copy_and_halt(*words):
    copy(*words)
    IndexedWriter.copy = copy
    os.kill(os.getpid(), signal.SIGSTOP)

IndexedWriter.copy = copy_and_halt
main()
"""


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- two builds


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with a.jsonl and b.jsonl, whose documents have the same lengths."""
    for letter in "ab":
        lines = [json.dumps({"text": f"{letter}{number:06} " * 100}) for number in range(20_000)]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(lines))
    return tmp_path


def build(folder: Path, letter: str, *more: str, script: str = MEGALLAMA) -> list[str]:
    words = ["data", "build", f"{folder}/{letter}.jsonl", "--output", f"{folder}/X", *more]
    return [sys.executable, "-c", script, *words]


@contextmanager
def halted_build(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A build of a.jsonl that stands still in the middle of X.bin."""
    command = build(folder, "a", "--workers", "1", script=HALTING)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        try:
            wait_for(lambda: state(first.pid) == "T" or first.poll() is not None)
            assert first.poll() is None
            assert any(path.stat().st_size for path in folder.glob("X.bin.*.tmp"))
            yield first
        finally:
            first.kill()


def letters(folder: Path) -> set[str]:
    """The first letters of all documents of X, each of which is there."""
    found = open_indexed(f"{folder}/X")
    assert found.num_documents == 20_000
    return {chr(found.document(number)[0]) for number in range(found.num_documents)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".parts")}


DONE = {"a.jsonl", "b.jsonl", "X.bin", "X.idx", "X.json"}


def test_a_second_build_is_refused_while_the_first_lives(sources: Path) -> None:
    with halted_build(sources) as first:
        second = subprocess.run(build(sources, "b"), capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert second.stderr == (
            f"megallama: --output {sources}/X is in use by process {first.pid} on {os.uname().nodename}; "
            "wait until it has ended, or choose another --output\n"
        )
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    assert letters(sources) == {"a"}
    assert names(sources) == DONE


def test_a_killed_build_holds_nothing_and_leaves_nothing_in_the_next(sources: Path) -> None:
    with halted_build(sources) as first:
        first.kill()
        first.wait()
    assert ".X.lock" in names(sources)
    build_dataset([f"{sources}/b.jsonl"], f"{sources}/X", "bytes", workers=1)
    assert letters(sources) == {"b"}
    assert names(sources) == DONE


def test_a_build_whose_lock_was_removed_replaces_nothing(sources: Path) -> None:
    with halted_build(sources) as first:
        (sources / ".X.lock").unlink()
        build_dataset([f"{sources}/b.jsonl"], f"{sources}/X", "bytes", workers=1)
        first.send_signal(signal.SIGCONT)
        _, said = first.communicate()
    assert first.returncode == 2
    (sentence,) = without_progress(said)
    assert sentence.startswith(f"megallama: --output {sources}/X is no longer this command's: its lock ")
    assert "nothing was replaced" in sentence
    assert letters(sources) == {"b"}
    assert names(sources) == DONE


def test_workers_end_with_a_build_that_is_killed_and_the_next_is_whole(sources: Path) -> None:
    with subprocess.Popen(build(sources, "a", "--workers", "2"), stderr=subprocess.DEVNULL) as first:
        wait_for(lambda: list(sources.glob("X.parts/*.shard.*.tmp")))  # one that is being written
        workers = children(first.pid)
        assert len(workers) >= 2
        first.kill()
    # Beside workers that may not have noticed yet.
    build_dataset([f"{sources}/a.jsonl"], f"{sources}/X", "bytes", workers=1)
    assert letters(sources) == {"a"}
    wait_for(lambda: not any(alive(pid) for pid in workers))
    assert names(sources) == DONE
    assert not list(sources.glob("X.parts"))


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for path in found for word in path.read_text().split()]


def state(pid: int) -> str:
    """As the kernel tells it: T where it stands still, Z where it has ended; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def alive(pid: int) -> bool:
    return state(pid) not in ("", "Z")


def test_a_dataset_that_is_read_stays_what_it_was_while_it_is_replaced(sources: Path) -> None:
    for letter in "ab":
        build_dataset([f"{sources}/{letter}.jsonl"], f"{sources}/X", "bytes", workers=1, force=letter == "b")
        if letter == "a":
            reading = open_indexed(f"{sources}/X")
    assert chr(reading.document(19_999)[0]) == "a"
    assert letters(sources) == {"b"}


# --- every other command that writes to a named place


@contextmanager
def held(lock_file: Path) -> Iterator[None]:
    with output_lock(lock_file, "it", "it"):
        yield


REFUSED = rf"is in use by process {os.getpid()} on .*; wait until it has ended, or choose another "


def test_a_second_training_of_a_tokenizer_is_refused_and_leaves_what_stands(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text, and more text\n" * 99)
    folder, words = tmp_path / "tok", ([str(tmp_path / "a.txt")], str(tmp_path / "tok"))
    train_tokenizer(*words, 260)
    before = load_tokenizer(str(folder)).fingerprint
    with held(folder / ".lock"), pytest.raises(UserError, match=rf"^--output {folder} {REFUSED}--output$"):
        train_tokenizer(*words, 261, force=True)
    assert load_tokenizer(str(folder)).fingerprint == before
    train_tokenizer(*words, 261, force=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "megallama_tokenizer.json",
        "ranks.tiktoken",
        "training.json",
    ]


def test_a_tokenizer_that_was_killed_half_way_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text, and more text\n" * 99)
    words = ([str(tmp_path / "a.txt")], str(tmp_path / "tok"))
    train_tokenizer(*words, 260)
    monkeypatch.setattr("megallama.text.tokenizer.write_sidecar", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        train_tokenizer(*words, 261, force=True)
    monkeypatch.undo()
    tokenizer, reused = train_tokenizer(*words, 261)
    assert (tokenizer.vocab_size, reused) == (261, False)


@pytest.mark.parametrize("option", ["--write", "--sbatch", "--plot"])
def test_a_second_plan_to_one_file_is_refused(option: str, tmp_path: Path) -> None:
    target = tmp_path / ("it.svg" if option == "--plot" else "it")
    words = [f"{ROOT}/configs/1b.yaml", "--gpus", "8", f"{option}={target}"]
    if option != "--plot":
        words += ["--search", "--gpu", "h100"]
    if option == "--sbatch":
        words += [f"--write={tmp_path / 'other'}"]
    with held(beside(target)):
        result = CliRunner().invoke(app, ["plan", *words])
        assert isinstance(result.exception, UserError), result.output
        assert f"{option}={target} is in use by process {os.getpid()} on " in str(result.exception)
        assert names(tmp_path) == {beside(target).name}
    if option == "--plot":
        assert CliRunner().invoke(app, ["plan", *words]).exit_code == 0
        assert names(tmp_path) == {"it.svg"}


def test_a_second_calibration_of_one_file_is_refused(tmp_path: Path) -> None:
    from megallama.plan.calibrate import calibrate

    file, run = tmp_path / "mine.yaml", made_run(tmp_path / "run", 20.0)
    with held(beside(file)), pytest.raises(UserError, match=rf"^--hardware={file} {REFUSED}--hardware$"):
        calibrate(run, file)
    assert not file.exists()
    calibrate(run, file)
    assert "calibrated" in yaml.safe_load(file.read_text())["h100-80g"]["efficiency"]
    assert names(tmp_path) == {"mine.yaml", "run"}


def test_a_second_job_of_a_run_is_refused_while_the_first_is_sent(tmp_path: Path) -> None:
    with held(tmp_path / ".job.sh.lock"), pytest.raises(UserError, match=rf"^job.sh of run.dir={tmp_path} {REFUSED}"):
        send(tmp_path, "#!/bin/sh\n", 1)
    assert names(tmp_path) == set()


# --- the lock itself


def test_a_run_is_refused_after_somebody_removed_the_lock_of_a_live_one(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / LOCK).unlink()
        with pytest.raises(UserError) as refusal:
            RunLock(tmp_path, handover_seconds=0)
        assert names(tmp_path) == set(), "and it puts no lock of its own there"
    assert str(refusal.value) == (
        f"run.dir={tmp_path} is in use by another process, whose lock {tmp_path}/lock was removed; stop that run "
        f"(touch {tmp_path}/STOP), or use another run.dir"
    )
    with RunLock(tmp_path, handover_seconds=0):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_who_waited_for_a_lock_that_was_taken_away_holds_the_next(tmp_path: Path) -> None:
    """Its holder removes the file as it ends: a lock on that keeps nobody out."""
    path, waiting = tmp_path / LOCK, []
    first = RunLock(tmp_path)
    waiter = threading.Thread(target=lambda: waiting.append(Lock(path, Place("X", "wait", "go"), handover_seconds=60)))
    waiter.start()
    wait_for(lambda: [link for link in links() if link == str(path)] == [str(path)] * 2)
    path.unlink()
    first.release()
    waiter.join()
    with waiting[0], pytest.raises(UserError, match="in use"):
        Lock(path, Place("X", "wait", "go"))


def links() -> list[str]:
    """The files that this process has open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(os.readlink(descriptor))
    return found


def test_a_full_disk_takes_no_facts_but_the_lock_holds(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with output_lock(tmp_path / ".X.lock", "X", "X"), pytest.raises(UserError, match="in use by another process;"):
            output_lock(tmp_path / ".X.lock", "X", "X").__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
