"""The file that sbatch takes for a run: what slurm/7b.sh is for the 7B recipe, written for any. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def job_file(config: Path, overrides: Sequence[str], run_dir: Path, log: str, allocation: Allocation) -> str:
    """Its text. It calls slurm/run.sh of the folder that it is submitted from; words after the file are overrides.

    Slurm makes no folder for `log`, and runs no job whose log it cannot open.
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
            *(f"#SBATCH {shlex.quote(option)}" for option in asked),
            *ranks,
            f'exec bash "$SLURM_SUBMIT_DIR/slurm/run.sh" {shlex.join([str(config), *overrides])} "$@"',
            "",
        ]
    )
