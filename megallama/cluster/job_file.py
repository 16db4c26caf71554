"""The file that sbatch takes for a run: what slurm/7b.sh is for the 7B recipe, written for any. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megallama.errors import UserError

JOB_FILE = "job.sh"
"""In the run directory."""


@dataclass(frozen=True)
class Allocation:
    """What a job asks of Slurm."""

    nodes: int
    ranks_per_node: int
    gpus: bool
    """Whether each rank has a GPU."""
    time: str
    signal_seconds: int
    """Ahead of the time limit that the run is asked to save."""
    options: Sequence[str] = ()
    """More options of sbatch, as --partition=gpu."""


def job_name(run_dir: Path) -> str:
    """Of the run; jobs of one name that are sent with --dependency=singleton follow each other."""
    return "megallama-" + re.sub(r"[^A-Za-z0-9._-]", "_", run_dir.name)


def log_of(run_dir: Path) -> str:
    """The log of each of a run's jobs, as sbatch takes it: `%j` is the job's number, and any other `%` is one."""
    return f"{str(run_dir).replace('%', '%%')}/logs/job-%j.log"


def job_file(config: Path, overrides: Sequence[str], run_dir: Path, log: str, allocation: Allocation) -> str:
    """Its text. It calls slurm/run.sh of the folder that it is submitted from; words after the file are overrides.

    Slurm makes no folder for `log`, and runs no job whose log it cannot open. UserError for an option that a line of
    sbatch cannot carry.
    """
    asked = [
        f"--job-name={job_name(run_dir)}",
        f"--nodes={allocation.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={allocation.ranks_per_node}"] if allocation.gpus else []),
        "--exclusive",
        "--mem=0",
        f"--time={allocation.time}",
        f"--signal=B:USR1@{allocation.signal_seconds}",
        "--requeue",
        f"--output={log}",
        "--open-mode=append",
        *allocation.options,
    ]
    ranks = [] if allocation.gpus else [f"export MEGALLAMA_NPROC_PER_NODE={allocation.ranks_per_node}"]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {_quoted(option)}" for option in asked),
            *ranks,
            f'exec bash "$SLURM_SUBMIT_DIR/slurm/run.sh" {shlex.join([_no_option(str(config)), *overrides])} "$@"',
            "",
        ]
    )


def _quoted(option: str) -> str:
    """An option in a line that begins with #SBATCH. The line is a comment to the shell: what follows it would run."""
    if not option.startswith("-"):
        raise UserError(f"--option={option} is no option of sbatch; write for example --option=--partition=gpu")
    for char in option:
        if not char.isprintable() or char in "'\\":
            raise UserError(
                f"the option {option} of sbatch holds {char!r}, which no line of a job file can carry; use another name"
            )
    return shlex.quote(option)


def _no_option(path: str) -> str:
    return f"./{path}" if path.startswith("-") else path
