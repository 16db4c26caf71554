"""Slurm's commands, as far as a run needs them: send a job, find a run's jobs, cancel them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megallama.errors import UserError

_FIELDS = "jobid,state,reason,nodelist,timeused,timelimit,restartcnt,command"


@dataclass(frozen=True)
class Job:
    """A job that waits or runs."""

    id: str
    state: str
    """As squeue says it: PENDING, RUNNING, COMPLETING ..."""
    reason: str
    """Why it waits."""
    nodes: str
    time_used: str
    time_limit: str
    restarts: int
    command: str
    """The job file it was sent as."""


def submit(*words: str) -> str:
    """`sbatch WORDS`; the job's id."""
    return _call("sbatch", "--parsable", *words).strip().partition(";")[0]


def cancel_waiting(job: str) -> None:
    """Take a job out of the queue, if it has not begun meanwhile."""
    _call("scancel", "--state=PENDING", job)


def my_jobs() -> list[Job]:
    """The jobs of this user that wait or run, oldest first."""
    lines = _call("squeue", "--me", "--noheader", "--sort=i", f"--Format={_long(_FIELDS)}").splitlines()
    found = []
    for line in lines:
        words = [word.strip() for word in line.split(_SEPARATOR)]
        id, state, reason, nodes, used, limit, restarts, command, *_ = words
        found.append(Job(id, state, reason, nodes, used, limit, int(restarts or 0), command))
    return found


_SEPARATOR = "\x1f"
_WIDEST = 4096
"""The longest path on Linux."""


def _long(fields: str) -> str:
    """Fields of squeue's --Format without its cut at 20 characters."""
    return ",".join(f"{field}:{_WIDEST}{_SEPARATOR}" for field in fields.split(","))


def _call(*words: str) -> str:
    if shutil.which(words[0]) is None:
        raise UserError(
            f"{words[0]} is not on PATH: this machine has no Slurm; go to a login node of the cluster, or start "
            "the run with torchrun or deepspeed (docs/clusters.md)"
        )
    found = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=_environment())
    if found.returncode != 0:
        said = re.sub(r"^\w+: (error: )?", "", found.stderr.strip().splitlines()[-1] if found.stderr.strip() else "")
        raise UserError(f"{words[0]} refused: {said or f'exit code {found.returncode}'}")
    return found.stdout


def _environment() -> dict[str, str]:
    """Without what formats other people's output."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}


def of_run(jobs: list[Job], job_file: Path, last: str) -> list[Job]:
    """Pick the jobs that were sent as this file, are the job that last ran there, or were sent by its command."""
    commands = {str(job_file)} | {job.command for job in jobs if job.id == last}
    return [job for job in jobs if job.command in commands]
