"""Runs that something happens to: started in the background, disturbed, and held against one that was left alone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megallama.parallel.launch import Launch
from megallama.parallel.spawn import RankFailedError, run_ranks
from megallama.verify.compare import read_tensors
from tests.launching import (
    BIN,
    PRETRAIN,
    ROOT,
    Plant,
    arguments,
    clean_environment,
    events,
    kill_all,
    outliving,
    pretrain_here,
    processes_of,
)
from tests.test_launchers import free_port


@dataclass(frozen=True)
class Layout:
    """A way to spread the run, and the keys that say so."""

    world_size: int
    words: tuple[str, ...] = ()


DP2 = Layout(2, ("zero.stage=2", "train.average.kind=exponential"))
TP2 = Layout(2, ("parallel.tensor=2",))
TP2_BF16 = Layout(2, ("parallel.tensor=2", "train.dtype=bf16"))
PP2 = Layout(2, ("parallel.pipeline=2", "parallel.schedule=dualpipev", "train.micro_batch_size=1"))
RAMP = Layout(
    2,
    (
        "zero.stage=2",
        "train.micro_batch_size=1",
        "train.global_batch_size=8",
        "train.batch_ramp=[{global_batch_size: 2, until: 640}, {global_batch_size: 4, until: 1K}]",
    ),
)
"""The first ten of its steps are of 2 sequences, three of 4, the others of 8."""
ALONE = Layout(1)


def words(dataset: str, run_dir: Path, layout: Layout, *more: str) -> list[str]:
    """A run whose saves, one after each step and of 5.5 MB (7.3 with an average), take about as long as its steps."""
    model = ["model.hidden_size=96", "model.intermediate_size=256", "model.num_hidden_layers=4"]
    return arguments(dataset, run_dir, *model, "evaluation.every=0", "checkpoint.every=1", *layout.words, *more)


class Running(Protocol):
    """A start of a run that goes on beside the test."""

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that have begun."""

    def over(self) -> bool:
        """Whether it has ended by itself."""


class Forked:
    """Ranks forked from the server; the end of one is the end of all, as a launcher does it."""

    def __init__(self, future: Future[list[tuple[int, str]]], home: Path) -> None:
        self._future, self._home = future, home

    def ranks(self) -> dict[int, int]:
        found = {int(path.suffix[1:]): path.read_text() for path in self._home.glob("pid.*")}
        return {rank: int(text) for rank, text in found.items() if text}

    def over(self) -> bool:
        return self._future.done()

    def results(self) -> list[tuple[int, str]]:
        """Exit code and stderr of each rank, when all have ended. RankFailedError if one was killed or raised."""
        return self._future.result()


@contextmanager
def forked(world_size: int, words: list[str], home: Path, plant: Plant | None = None) -> Iterator[Forked]:
    """Start a run; at the end it is waited for, however it ends."""
    home.mkdir(exist_ok=True)
    for path in home.glob("pid.*"):
        path.unlink()
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(run_ranks, marked, world_size, words, home, plant, log=home / "log", timeout=120.0)
        running = Forked(future, home)
        yield running
        with suppress(RankFailedError):
            running.results()


def marked(launch: Launch, words: list[str], home: Path, plant: Plant | None) -> tuple[int, str]:
    """One rank, which says its process id, and whose children have `home` for a mark."""
    os.environ["HOME"] = str(home)
    (home / f"pid.{launch.rank}").write_text(str(os.getpid()))
    return pretrain_here(launch, words, plant)


class Cold:
    """A command as a user types it, in processes that nothing was loaded into before."""

    def __init__(self, process: subprocess.Popen[bytes], home: Path, *, plain: bool) -> None:
        self.process, self.home, self._plain = process, home, plain

    def ranks(self) -> dict[int, int]:
        if self._plain:
            return {0: self.process.pid}
        found = {}
        for pid in processes_of(self.home):
            with suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = next((int(word[5:]) for word in environment if word.startswith(b"RANK=")), None)
                if rank is not None and PRETRAIN.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found[rank] = pid
        return found

    def over(self) -> bool:
        return self.process.poll() is not None

    def errors(self) -> str:
        """What was printed to stderr so far."""
        return (self.home / "err.log").read_text(errors="replace")


@contextmanager
def cold(command: list[str], home: Path, *, own_group: bool = False, **variables: str) -> Iterator[Cold]:
    """Start a command; nothing of it is left at the end. One test, one home: it marks the processes.

    `own_group`: as the shell of a terminal starts it, whose Ctrl-C goes to its whole process group.
    """
    home.mkdir(exist_ok=True)
    environment = clean_environment(home, OMP_NUM_THREADS="1", **variables)
    with (home / "out.log").open("w") as out, (home / "err.log").open("w") as err:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=own_group,
        )
    try:
        yield Cold(process, home, plain=command[:2] == [sys.executable, PRETRAIN])
    finally:
        kill_all(home)
        process.wait()


def command(launcher: str, num_ranks: int) -> list[str]:
    """What starts launch/pretrain.py on that many ranks; the run's own words follow."""
    if launcher == "python":
        assert num_ranks == 1
        return [sys.executable, PRETRAIN]
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), f"--master-port={free_port()}", f"--nproc-per-node={num_ranks}", PRETRAIN]
    local = ["--hostfile=/dev/null", f"--master_port={free_port()}", f"--num_gpus={num_ranks}"]
    return [str(BIN / "deepspeed"), *local, PRETRAIN]


def wait_for(
    what: Callable[[], Any], running: Running | None = None, timeout: float = 90.0, every: float = 0.002
) -> bool:
    """Until `what()`, asked every so many seconds, is true; False if the run is over before. Fails after `timeout`."""
    deadline = time.monotonic() + timeout
    while not what():
        if running is not None and running.over():
            return bool(what())
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain"
        time.sleep(every)
    return True


def partial_saves(run_dir: Path) -> set[str]:
    """Names of the folders that are being written."""
    return {path.name for path in (run_dir / "checkpoints").glob("step_*.partial-*")}


def kill(pids: list[int], number: int = signal.SIGKILL) -> bool:
    """Whether any of them was still there to get the signal."""
    reached = False
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            reached = True
    return reached


def outcome(run_dir: Path) -> dict[str, Any]:
    """outcome.json."""
    found: dict[str, Any] = json.loads((run_dir / "outcome.json").read_text())
    return found


def steps(run_dir: Path, kind: str) -> list[int]:
    """The steps of the events of one kind."""
    return [event["step"] for event in events(run_dir, kind)]


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that are there, each of which is whole by its own manifest, byte for byte.

    Read here from the format's description, not by the code under test.
    """
    found = []
    for path in sorted((run_dir / "checkpoints").glob("step_*")):
        if path.name.removeprefix("step_").isdigit():
            files = json.loads((path / "manifest.json").read_text())["content"]["files"]
            assert {"tensors.json", "state.json", "rank_00000.bin"} <= files.keys()
            for name, file in files.items():
                assert hashlib.sha256((path / name).read_bytes()).hexdigest() == file["sha256"], path / name
            found.append(int(path.name.removeprefix("step_")))
    return found


def losses_by_step(run_dir: Path) -> dict[int, str]:
    """The loss of each step as it was trained last, to the bit."""
    return {event["step"]: float(event["loss"]).hex() for event in events(run_dir, "train")}


def assert_same_run(run_dir: Path, straight: Path) -> None:
    """The losses of every step, and weights and moments after the last, to the bit."""
    assert losses_by_step(run_dir) == losses_by_step(straight)
    last = max(losses_by_step(straight))
    ours, theirs = (read_tensors(path / "checkpoints" / f"step_{last:08d}") for path in (run_dir, straight))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].view(torch.int32), tensor.view(torch.int32)), name


def assert_nothing_left(home: Path) -> None:
    """No rank and no writer."""
    assert outliving(home, 5.0) == []
