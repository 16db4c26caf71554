"""Killed at any instant and started again, nobody can tell from what was trained.

100 random kill -9 of one rank or of all, at least half of them while a checkpoint is being written. A run is killed and
started again until it has finished, then the next one begins, until all kills are spent.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.runs import (
    DP2,
    PP2,
    RAMP,
    TP2_BF16,
    Layout,
    Running,
    assert_nothing_left,
    assert_same_run,
    cold,
    command,
    forked,
    kill,
    partial_saves,
    saved_steps,
    wait_for,
    words,
)
from tests.launching import events

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

STEPS = 24
FORKED = {
    "dp2-zero2 fp32": (DP2, 32),
    "tp2 bf16": (TP2_BF16, 20),
    "pp2-dualpipev fp32": (PP2, 30),
    "dp2 with a ramp": (RAMP, 8),
}
COLD = {"python": (Layout(1), 3), "torchrun": (DP2, 4), "deepspeed": (DP2, 3)}
SEEDS = {
    "dp2 with a ramp": 14,
    "dp2-zero2 fp32": 11,
    "tp2 bf16": 12,
    "pp2-dualpipev fp32": 13,
    "python": 21,
    "torchrun": 22,
    "deepspeed": 23,
}
START_SECONDS = 3.0
"""In which a forked run loads and trains a few steps."""
SAVE_SECONDS = 0.1
"""About what a save takes."""
BEHIND_SECONDS = 0.01
"""About what it takes to point at the new checkpoint and to delete an old one."""


@dataclass(frozen=True)
class Kill:
    """When a start is killed, and which of its ranks."""

    save: int | None
    """While the n-th save of this start is written, or None for any time."""
    delay: float
    """Seconds after that save has begun, or has become a checkpoint, or after the start."""
    behind: bool
    """As soon as that save is a checkpoint, when older ones are deleted. Otherwise within it, or the next."""
    victim: int | None
    """A rank, or None for all."""


def draw(random: Random, number: int, world_size: int, start_seconds: float) -> Kill:
    """Of four kills in a row two are within a save, one is just behind it, and one at any time."""
    save = random.choice([1, 1, 2, 3]) if number % 4 < 3 else None
    behind = number % 4 == 2
    longest = start_seconds if save is None else BEHIND_SECONDS if behind else SAVE_SECONDS
    return Kill(save, random.uniform(0, longest), behind, random.choice([None, *range(world_size)]))


def carry_out(plan: Kill, running: Running, world_size: int, run_dir: Path) -> bool | None:
    """Whether something was being saved when it was killed, or None if it was over before."""
    wait_for(lambda: len(running.ranks()) == world_size, running, every=0.05)
    pids = running.ranks()  # now: looking for them takes as long as a save
    victims = list(pids.values()) if plan.victim is None else [pids[rank] for rank in pids if rank == plan.victim]
    left_before, seen = partial_saves(run_dir), set[str]()

    def saves(number: int) -> bool:
        seen.update(partial_saves(run_dir) - left_before)
        return len(seen) >= number

    number, saving = plan.save or 0, set[str]()
    while True:
        if not wait_for(partial(saves, number), running):
            return None
        if plan.behind:
            wait_for(lambda: not partial_saves(run_dir) - left_before, running)
        time.sleep(plan.delay)
        saving = partial_saves(run_dir) - left_before
        if saving or plan.behind or plan.save is None:
            break
        number = len(seen) + 1
    return bool(saving) if not running.over() and kill(victims) else None


Start = Callable[[], AbstractContextManager[Running]]


def kill_again_and_again(
    start: Start, layout: Layout, home: Path, random: Random, kills: int, hits: list[bool], start_seconds: float
) -> None:
    """Start the run in home/run until it is done; add to `hits` whether each kill, up to that many, was in a save."""
    run_dir, before = home / "run", list[int]()
    while True:
        before, earlier = saved_steps(run_dir), before
        assert before[-1:] >= earlier[-1:], "the newest is never deleted"
        told = len(events(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
        with start() as running:
            plan = draw(random, len(hits), layout.world_size, start_seconds) if len(hits) < kills else None
            hit = carry_out(plan, running, layout.world_size, run_dir) if plan else None
            wait_for(running.over)
        assert_nothing_left(home)
        new = events(run_dir)[told:] if (run_dir / "metrics.jsonl").exists() else []
        if any(event["event"] in ("resume", "eval", "train", "stop") for event in new):
            # It went on from the newest whole checkpoint that the start before had left.
            assert [event["step"] for event in new if event["event"] == "resume"] == before[-1:]
        if hit is None:
            assert new[-1]["event"] == "stop" and new[-1]["reason"] == "done"
            return
        hits.append(hit)


def kill_runs(
    start: Callable[[Path], AbstractContextManager[Running]],
    layout: Layout,
    straight: Path,
    folder: Path,
    seed: int,
    kills: int,
    start_seconds: float,
) -> None:
    """As many runs as it takes; each ends like `straight`."""
    random, hits, runs = Random(seed), list[bool](), 0
    while len(hits) < kills:
        runs += 1
        home = folder / f"run-{runs}"
        home.mkdir()
        kill_again_and_again(partial(start, home), layout, home, random, kills, hits, start_seconds)
        assert_same_run(home / "run", straight)
        # keep is 2: what else is there was set aside, and nothing is left half written or half deleted.
        assert saved_steps(home / "run") == [STEPS - 1, STEPS]
        assert (home / "run" / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}"
        names = {path.name for path in (home / "run" / "checkpoints").iterdir()} - {"latest", "best"}
        assert {name for name in names if "." in name and ".torn-" not in name} == set()
    print(f"{len(hits)} kills in {runs} runs, {sum(hits)} of them during a save")
    assert 2 * sum(hits) >= kills


@pytest.mark.parametrize("name", FORKED)
def test_a_run_killed_at_any_instant_ends_like_one_that_was_not(
    name: str, byte_dataset: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    layout, kills = FORKED[name]

    def start(home: Path) -> AbstractContextManager[Running]:
        return forked(layout.world_size, words(byte_dataset, home / "run", layout, f"train.steps={STEPS}"), home)

    straight = undisturbed(layout, STEPS)
    kill_runs(start, layout, straight, tmp_path, SEEDS[name], kills, START_SECONDS)


@pytest.mark.parametrize("launcher", COLD)
def test_a_run_killed_under_a_launcher_ends_like_one_that_was_not(
    launcher: str, byte_dataset: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    layout, kills = COLD[launcher]

    def start(home: Path) -> AbstractContextManager[Running]:
        arguments = words(byte_dataset, home / "run", layout, f"train.steps={STEPS}")
        return cold([*command(launcher, layout.world_size), *arguments], home)

    straight = undisturbed(layout, STEPS)
    kill_runs(start, layout, straight, tmp_path, SEEDS[launcher], kills, 4 * START_SECONDS)


SAVES_KILLED_AT = """
import os, signal, sys
from pathlib import Path
from megallama.checkpoint.writing.commit import Retention, commit, apply_retention
from megallama.checkpoint.format import folder_name, write_bytes

folder, left = Path(sys.argv[1]), int(sys.argv[2])

def count(event, arguments):
    global left
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
for step in (1, 2, 3):
    unfinished = folder / f"{folder_name(step)}.partial-x"
    unfinished.mkdir()
    files = {"rank_00000.bin": write_bytes(unfinished / "rank_00000.bin", bytes(1000))}
    documents = {"tensors.json": {}, "state.json": {"state": {"validation_loss": 1 / step}}}
    commit(unfinished, folder / folder_name(step), files, documents, 0.0, {})
    apply_retention(folder, Retention(1))
"""


def test_a_writer_killed_before_any_operation_on_the_disk_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """Each in turn, where chance would hardly hit the short ones: what is named as a checkpoint is one, always."""
    newest, operations = 0, 0
    while True:
        folder = tmp_path / str(operations) / "checkpoints"
        folder.mkdir(parents=True)
        code = subprocess.run([sys.executable, "-c", SAVES_KILLED_AT, str(folder), str(operations)]).returncode
        saved = saved_steps(folder.parent)
        assert max(saved, default=0) in (newest, newest + 1)
        newest = max(saved, default=0)
        if (latest := folder / "latest").exists():
            assert latest.read_text() in {path.name for path in folder.iterdir()}
        if code == 0:
            break
        assert code == -signal.SIGKILL
        operations += 1
    assert saved == [3]
    assert operations > 40


def test_a_hundred_kills_are_planned_ten_of_them_cold() -> None:
    cold_kills = sum(kills for _, kills in COLD.values())
    assert cold_kills >= 10
    assert sum(kills for _, kills in FORKED.values()) + cold_kills >= 100
