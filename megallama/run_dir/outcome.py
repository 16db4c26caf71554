"""How a start of a run ended, as a file that scripts read: launchers change exit codes, torchrun makes each 1."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OUTCOME = "outcome.json"
REQUEUE_CODE = 75
"""Exit code after a complete save that waits to be started again (EX_TEMPFAIL of sysexits.h)."""

STOP_FILE = "STOP"
_SPARE = f".{OUTCOME}.spare"
"""A file as large as an outcome can become, so that the end of a run can be told when its disk has filled up."""
_SPARE_BYTES = 1 << 14
_REASON_CHARACTERS = 2000

BY_STOP_FILE = f"stopped by the file {STOP_FILE}"
"""The reason of a run that a person, or the script of its job, asked to stop."""

Status = Literal["running", "done", "stopped", "requeue", "failed"]
"""stopped is by train.stop_after; running, where no process holds the lock, is a run that was killed."""


@dataclass
class Reached:
    """How far this start of a run has come, for whatever ends it to tell."""

    step: int = 0


def write_outcome(run_dir: Path, status: Status, step: int, reason: str) -> None:
    """Replace the outcome of the run. A full disk has room for the one that follows `running`."""
    content = {
        "status": status,
        "step": step,
        "reason": reason[:_REASON_CHARACTERS],
        "time": time.time(),
        **_start(),
    }
    partial = run_dir / f".{OUTCOME}.{os.getpid()}"
    with suppress(FileNotFoundError):
        (run_dir / _SPARE).rename(partial)  # one rank gets it, should several have something to tell
    _fill(partial, json.dumps(content).encode())
    partial.replace(run_dir / OUTCOME)
    if status == "running":
        _fill(run_dir / _SPARE, b" " * _SPARE_BYTES)


def write_failure(run_dir: Path, reason: str, step: int) -> None:
    """Record what ended a run that was running, at `step`; of several ranks that fail, the first one's reason stays."""
    try:
        found = json.loads((run_dir / OUTCOME).read_text())
        # A rank of a job that was requeued may still be about to fail when the next start runs.
        if found["status"] == "running" and found | _start() == found:
            write_outcome(run_dir, "failed", step, reason)
    except (OSError, ValueError):
        return  # nothing was running, or the disk is what failed: the sentence on stderr is all there is


def _fill(path: Path, content: bytes) -> None:
    """Write a file, over what it holds: the blocks that it has are its own on a full disk too."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:
        file.write(content)
        file.truncate()
        os.fsync(file.fileno())


def _start() -> dict[str, object]:
    """Which start of a Slurm job this is."""
    return {"job": os.environ.get("SLURM_JOB_ID"), "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0))}


def exit_code(status: Status, *, elastic: bool) -> int:
    """What a rank leaves with. torchrun would make 75 a failure of the rank, so there it is 0."""
    if status == "failed":
        return 1
    return REQUEUE_CODE if status == "requeue" and not elastic else 0
