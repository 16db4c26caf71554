"""Asked to stop, however the signal comes: one save at a step that all ranks agree on, and the run goes on later."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.runs import (
    ALONE,
    DP2,
    Cold,
    Layout,
    assert_same_run,
    cold,
    command,
    kill,
    outcome,
    saved_steps,
    steps,
    wait_for,
    words,
)
from tests.launching import execute, outliving, pretrain, processes_of

pytestmark = pytest.mark.faults

STEPS = 24
REQUEUE = 75
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
    with cold([*command("python", 1), *arguments], tmp_path) as run:
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
