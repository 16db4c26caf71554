"""Asked to stop, however the signal comes: one save at a step that all ranks agree on, and the run goes on later."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch.distributed as dist

from megallama.parallel.spawn import RankFailedError
from tests.faults.conftest import Undisturbed
from tests.faults.runs import (
    ALONE,
    DP2,
    Cold,
    Layout,
    assert_same_run,
    cold,
    command,
    forked,
    kill,
    outcome,
    saved_steps,
    steps,
    wait_for,
    words,
)
from tests.launching import ROOT, clean_environment, execute, kill_all, outliving, pretrain, processes_of
from tests.test_launchers import free_port

pytestmark = pytest.mark.faults

STEPS = 60
"""A second or two of them: a test that the machine holds up must not find the run over."""
REQUEUE = 75
INTERRUPTED = 130
FIRST_PRESS = "megallama: Ctrl-C: this step is finished and saved; once more ends at once, without the save"
SAFE = "what was saved is safe, and the same command continues"
SECOND_PRESS = f"megallama: ended by a second Ctrl-C before the save was done; {SAFE}"
EARLY_PRESS = f"megallama: ended by Ctrl-C before the first step; {SAFE}"
LEAVE_SECONDS = 45.0
"""In which ranks without a launcher have noticed, saved and left."""


def one_rank(run: Cold) -> list[int]:
    return [run.ranks()[1]]


def launcher(run: Cold) -> list[int]:
    return [run.process.pid]


def node_launcher(run: Cold) -> list[int]:
    """The process between the `deepspeed` command and its ranks."""
    parents = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] for pid in run.ranks().values()]
    return [int(parents[0])]


def everything(run: Cold) -> list[int]:
    """As Slurm does: the launcher, its ranks, and their writers."""
    return processes_of(run.home)


CASES = [
    (name, target, number)
    for name in ("torchrun", "deepspeed")
    for target in (one_rank, launcher, everything)
    for number in (signal.SIGTERM, signal.SIGUSR1)
]
CASES += [("torchrun", launcher, signal.SIGKILL), ("deepspeed", launcher, signal.SIGKILL)]
CASES += [("deepspeed", node_launcher, number) for number in (signal.SIGTERM, signal.SIGKILL)]


@pytest.mark.parametrize(
    ("name", "target", "number"), CASES, ids=[f"{n}-{number.name}-{target.__name__}" for n, target, number in CASES]
)
def test_a_signal_anywhere_under_a_launcher_is_one_agreed_save(
    name: str,
    target: object,
    number: signal.Signals,
    byte_dataset: str,
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    arguments = words(byte_dataset, tmp_path / "run", DP2, f"train.steps={STEPS}", "checkpoint.every=0")
    with cold([*command(name, 2), *arguments], tmp_path) as run:
        wait_until_trained(run, tmp_path / "run", 3)
        assert callable(target)
        kill(target(run), number)
        code = run.process.wait(LEAVE_SECONDS)
        assert outliving(tmp_path, LEAVE_SECONDS) == [], "no rank and no writer is left"
    if target is one_rank:
        assert code == (REQUEUE if name == "deepspeed" else 0), run.errors()
    assert_one_save(tmp_path / "run")
    same_command = number is signal.SIGTERM
    go_on_and_compare(name, DP2, byte_dataset, tmp_path, undisturbed, same_command=same_command)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_that_do_not_end_are_one_save_and_code_75(
    number: signal.Signals, byte_dataset: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Every few milliseconds from the third step to the very end of the process: in the save and after it."""
    arguments = words(byte_dataset, tmp_path / "run", ALONE, f"train.steps={STEPS}", "checkpoint.every=0")
    with cold([*command("python", 1), *arguments], tmp_path) as run:
        wait_until_trained(run, tmp_path / "run", 3)
        while not run.over():
            kill([run.process.pid], number)
            time.sleep(0.003)
        assert outliving(tmp_path) == []
    assert run.process.returncode == REQUEUE, run.errors()
    assert_one_save(tmp_path / "run")
    go_on_and_compare("python", ALONE, byte_dataset, tmp_path, undisturbed)


@pytest.mark.parametrize("moment", ["torch is loaded", "the directory is taken"])
def test_a_signal_before_the_first_step_waits_for_it(
    moment: str, byte_dataset: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    arguments = words(byte_dataset, tmp_path / "run", ALONE, f"train.steps={STEPS}", "checkpoint.every=0")
    # Seconds of evaluations before the first step, of which those that have not begun by the signal are left out.
    sets = ", ".join(f"set{number}: {byte_dataset}" for number in range(20))
    evaluations = [f"evaluation.sets={{{sets}}}", "evaluation.samples=200"]
    with cold([*command("python", 1), *arguments, *evaluations], tmp_path) as run:
        maps = Path(f"/proc/{run.process.pid}/maps")
        if moment == "torch is loaded":
            wait_for(lambda: "libtorch" in maps.read_text(), run)
        else:
            wait_for((tmp_path / "run" / "outcome.json").exists, run)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.process.wait(LEAVE_SECONDS) == REQUEUE, run.errors()
        assert outliving(tmp_path) == []
    assert_one_save(tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [1]
    go_on_and_compare("python", ALONE, byte_dataset, tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["python", "torchrun", "deepspeed"])
def test_a_ctrl_c_in_a_terminal_is_one_agreed_save(name: str, byte_dataset: str, tmp_path: Path) -> None:
    """The terminal sends it to the launcher, its ranks and their writers alike."""
    layout = ALONE if name == "python" else DP2
    arguments = words(byte_dataset, tmp_path / "run", layout, f"train.steps={STEPS}", "checkpoint.every=0")
    with cold([*command(name, layout.world_size), *arguments], tmp_path, own_group=True) as run:
        wait_until_trained(run, tmp_path / "run", 3)
        os.killpg(run.process.pid, signal.SIGINT)
        code = run.process.wait(LEAVE_SECONDS)
        assert outliving(tmp_path, LEAVE_SECONDS) == [], "no rank and no writer is left"
    said = [line for line in run.errors().splitlines() if line.startswith("megallama: ")]
    assert said == [FIRST_PRESS], run.errors()
    assert "stopped by a signal; the same command continues\n" in (tmp_path / "out.log").read_text()
    if name == "python":
        assert (code, run.errors()) == (REQUEUE, FIRST_PRESS + "\n")
    assert_one_save(tmp_path / "run")


def test_a_terminal_that_is_closed_is_one_save(byte_dataset: str, tmp_path: Path) -> None:
    """Nothing can be printed any more."""
    ours, theirs = pty.openpty()
    take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    arguments = words(byte_dataset, tmp_path / "run", ALONE, f"train.steps={STEPS}", "checkpoint.every=0")
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            take,
            *command("python", 1),
            *arguments,
        ],
        cwd=ROOT,
        env=clean_environment(tmp_path, OMP_NUM_THREADS="1"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        seen = b""
        while b"step  3/" not in seen:
            seen += os.read(ours, 1 << 16)
        os.close(ours)
        assert process.wait(LEAVE_SECONDS) == REQUEUE
        assert outliving(tmp_path) == []
    finally:
        kill_all(tmp_path)
        process.wait()
    assert_one_save(tmp_path / "run")


def test_a_second_ctrl_c_ends_at_once(byte_dataset: str, tmp_path: Path) -> None:
    """Here while the disk stands still."""
    arguments = words(byte_dataset, tmp_path / "run", ALONE, "train.steps=100000")
    with cold([*command("python", 1), *arguments], tmp_path, own_group=True) as run:
        wait_until_trained(run, tmp_path / "run", 3)  # it has saved by then
        kill([pid for pid in processes_of(tmp_path) if pid != run.process.pid], signal.SIGSTOP)
        while not run.over():
            kill([run.process.pid], signal.SIGINT)
            time.sleep(0.01)
        assert outliving(tmp_path) == []
    assert run.process.returncode == INTERRUPTED
    assert run.errors().splitlines() == [FIRST_PRESS, SECOND_PRESS]
    said = outcome(tmp_path / "run")
    assert (said["status"], said["reason"]) == ("failed", SECOND_PRESS.removeprefix("megallama: ").partition(";")[0])
    assert said["step"] >= steps(tmp_path / "run", "train")[-1] >= 3
    assert saved_steps(tmp_path / "run")[-1] < said["step"]


def test_a_second_ctrl_c_ends_a_rank_that_waits_for_ever(byte_dataset: str, tmp_path: Path) -> None:
    """Its main thread is in a collective and hears nothing."""
    arguments = words(byte_dataset, tmp_path / "run", DP2, "train.steps=100000", "checkpoint.every=0")
    with forked(2, arguments, tmp_path) as run:
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and steps(tmp_path / "run", "train"), run)
        kill([run.ranks()[1]], signal.SIGSTOP)
        while not run.over():
            kill([run.ranks()[0]], signal.SIGINT)
            time.sleep(0.01)
        with pytest.raises(RankFailedError, match="rank 0 died without a word"):
            run.results()
    assert outcome(tmp_path / "run")["status"] == "failed"
    assert outcome(tmp_path / "run")["step"] >= 1


@pytest.mark.parametrize("moment", ["torch is loaded", "it waits for the other rank"])
def test_a_ctrl_c_before_there_is_a_run_ends_at_once(moment: str, byte_dataset: str, tmp_path: Path) -> None:
    port = free_port()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with cold([*command("python", 1), *words(byte_dataset, tmp_path / "run", DP2)], tmp_path, **place) as run:
        if moment == "torch is loaded":
            maps = Path(f"/proc/{run.process.pid}/maps")
            wait_for(lambda: "libtorch" in maps.read_text(), run)
        else:
            wait_for(lambda: listens(port), run)
            store = dist.PrefixStore("megallama/0", dist.TCPStore("127.0.0.1", port, wait_for_workers=False))
            wait_for(lambda: store.add("here", 0) == 1, run)
        os.kill(run.process.pid, signal.SIGINT)
        assert run.process.wait(LEAVE_SECONDS) == INTERRUPTED
    assert run.errors().splitlines() == [EARLY_PRESS]
    assert not (tmp_path / "run").exists()


def listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_ctrl_c_while_a_checkpoint_is_loaded_ends_at_once_and_loses_nothing(
    number: signal.Signals, byte_dataset: str, tmp_path: Path
) -> None:
    arguments = words(byte_dataset, tmp_path / "run", ALONE, "train.steps=4")
    assert pretrain(1, [*arguments, "train.stop_after=2"]) == [(0, "")]
    with pytest.raises(RankFailedError, match="rank 0 died without a word"):
        pretrain(1, arguments, plant=partial(interrupt_loading, number))
    said = outcome(tmp_path / "run")
    assert said["status"] == "failed"
    assert said["reason"].endswith("before the first step")
    assert saved_steps(tmp_path / "run") == [1, 2]
    assert pretrain(1, arguments) == [(0, "")]
    assert steps(tmp_path / "run", "train") == [1, 2, 3, 4]


def interrupt_loading(number: signal.Signals) -> None:
    """Somebody presses Ctrl-C in a load that takes for ever."""
    import megallama.train.saves

    train: Any = megallama.train.saves

    def endless(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        Event().wait()

    train.load = endless


def wait_until_trained(run: Cold, run_dir: Path, step: int) -> None:
    begun = wait_for(lambda: (run_dir / "metrics.jsonl").exists() and step in steps(run_dir, "train"), run)
    assert begun, run.errors()


def assert_one_save(run_dir: Path) -> None:
    """Of the step that the record of the end names, and nothing beside it."""
    said = outcome(run_dir)
    assert said["status"] == "requeue"
    assert said["reason"] in ("stopped by a signal", "stopped by the end of the launcher")
    assert said["step"] < STEPS
    assert steps(run_dir, "checkpoint") == steps(run_dir, "stop") == saved_steps(run_dir) == [said["step"]]
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"latest", f"step_{said['step']:08d}"}


def go_on_and_compare(
    name: str, layout: Layout, dataset: str, home: Path, undisturbed: Undisturbed, *, same_command: bool = True
) -> None:
    """Again to the end: the same command, or without a launcher the same ranks, which takes a third of the time."""
    arguments = words(dataset, home / "run", layout, f"train.steps={STEPS}", "checkpoint.every=0")
    stopped = outcome(home / "run")["step"]
    if same_command:
        ended = execute([*command(name, layout.world_size), *arguments], home, OMP_NUM_THREADS="1")
        assert (ended.code, ended.left_over) == (0, []), ended.err
    else:
        assert pretrain(layout.world_size, arguments) == [(0, "")] * layout.world_size
    assert steps(home / "run", "resume") == [stopped]
    assert outcome(home / "run")["status"] == "done"
    assert_same_run(home / "run", undisturbed(layout, STEPS))
