"""Starting runs from tests: commands as a user types them, in a clean environment, and ranks forked from a server."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.errors import UserError
from megallama.parallel.launch import Launch
from megallama.parallel.spawn import run_ranks

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PRETRAIN = str(ROOT / "launch" / "pretrain.py")
CONFIG = str(ROOT / "configs" / "debug.yaml")

# A proxy on a closed port: whatever asks for the network fails at once, also where there is one.
NO_NETWORK = {
    **{name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")},
    **{name: "" for name in ("NO_PROXY", "no_proxy")},
}

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="torch.compile needs a C++ compiler, g++ or what CXX names, and the headers of Python",
)

Plant = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str
    seconds: float
    ended: float
    """time.time() when it was gone."""
    left_over: list[int]
    """Processes that it started and that outlived it by three seconds; killed by now."""

    @property
    def sentences(self) -> list[str]:
        """What megallama itself said on stderr."""
        return [line for line in self.err.splitlines() if line.startswith("megallama: ")]

    def seconds_since(self, what: str) -> float:
        """From when a process printed `what` and its time.time() to stderr until the command was gone."""
        printed = re.search(rf"{what} (\S+)", self.err)
        assert printed, self.err
        return self.ended - float(printed[1])


def arguments(dataset: str, run_dir: Path, *more: str) -> list[str]:
    """Four steps of a model of 30,000 parameters; `more` are overrides that win."""
    tiny = [
        f"data.path={dataset}",
        f"run.dir={run_dir}",
        "data.sequence_length=32",
        "data.validation_fraction=0.2",
        "model.hidden_size=32",
        "model.intermediate_size=64",
        "train.steps=4",
        "train.device=cpu",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        "evaluation.every=2",
        "evaluation.samples=4",
    ]
    return ["--config", CONFIG, *tiny, *more]


def clean_environment(home: Path, **variables: str) -> dict[str, str]:
    """Nothing of this process's environment but PATH; every cache is empty and below `home`.

    What this process has imported its children import too, wherever it is installed.
    """
    return {
        "PYTHONPATH": os.pathsep.join(sorted({str(Path(torch.__file__).parents[1]), str(ROOT)})),
        "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # as in conftest.py
        "TORCH_EXTENSIONS_DIR": str(home / "torch-extensions"),
        **variables,
    }


def execute(command: Sequence[str], home: Path, *, timeout: float = 120.0, **variables: str) -> Outcome:
    """Run `command` from the repository's root as a user with this home. One test, one home: it marks the processes."""
    began = time.monotonic()
    with (home / "out.log").open("w+") as out, (home / "err.log").open("w+") as err:
        # To files: pipes would stay open, and be waited for, as long as an orphan holds them.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean_environment(home, **variables),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        try:
            code = process.wait(timeout)
            seconds, ended = time.monotonic() - began, time.time()
            left_over = outliving(home)
        finally:
            kill_all(home)
            process.wait()
        texts = [(home / name).read_text(errors="replace") for name in ("out.log", "err.log")]
    return Outcome(code, *texts, seconds, ended, left_over)


def without_progress(stderr: str) -> list[str]:
    """The lines of a build but those that a slow one, which takes more than ten seconds, says on its way."""
    return [line for line in stderr.splitlines() if not line.startswith("tokenising: ")]


def outliving(home: Path, seconds: float = 3.0) -> list[int]:
    """Processes of this home that are still there after `seconds`."""
    deadline = time.monotonic() + seconds
    while (found := processes_of(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def kill_all(home: Path) -> None:
    for pid in processes_of(home):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def processes_of(home: Path) -> list[int]:
    """Processes whose HOME this is: every rank inherits it, also where a launcher gives it a session of its own."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # gone meanwhile, or another user's
            continue
    return found


def pretrain(
    world_size: int, words: Sequence[str], *, plant: Plant | None = None, log: Path | None = None
) -> list[tuple[int, str]]:
    """launch/pretrain.py on every rank of a new world: exit code and stderr of each. Seconds less than a launcher."""
    return run_ranks(pretrain_here, world_size, list(words), plant, log=log, timeout=120.0)


def pretrain_here(launch: Launch, words: list[str], plant: Plant | None) -> tuple[int, str]:
    """One rank of `pretrain`; `plant` is called first."""
    os.environ.update(
        RANK=str(launch.rank),
        LOCAL_RANK=str(launch.local_rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_WORLD_SIZE=str(launch.local_world_size),
    )
    if plant is not None:
        plant()
    stderr = io.StringIO()
    with redirect_stderr(stderr):
        try:
            program = load_pretrain()
            here = program.launch_here()
            code = program.main(words, replace(here, door=launch.door) if here.port == launch.port else here)
        except UserError as error:
            return 2, f"megallama: {error}\n"
    return code, stderr.getvalue()


def load_pretrain() -> Any:
    """launch/pretrain.py as a module; its folder is no package."""
    spec = importlib.util.spec_from_file_location("launch.pretrain", PRETRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def events(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, of one kind or all; NaN and Infinity, which are no JSON, are refused."""
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]  # a run may be writing the last one
    found = [json.loads(line, parse_constant=_refuse) for line in lines]
    return [event for event in found if kind in (None, event["event"])]


def losses(run_dir: Path) -> list[float]:
    """The training loss of every step."""
    return [event["loss"] for event in events(run_dir, "train")]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
