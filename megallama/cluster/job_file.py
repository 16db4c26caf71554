"""The file that sbatch takes for a run, of any config; `slurm/generate.py` makes those of the recipes by it. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megallama.errors import UserError, refuse_hidden

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
    """The name of the run's jobs: those of one name sent with --dependency=singleton follow each other."""
    return "megallama-" + re.sub(r"[^A-Za-z0-9._-]", "_", run_dir.name)


def log_of(run_dir: Path, job: str) -> str:
    """The log of a job of `megallama launch`, by its number."""
    return f"{run_dir}/logs/job-{job}.log"


def log_pattern(run_dir: Path) -> str:
    """`log_of` the job, as sbatch and srun take it: `%j` is the job's number, and any other `%` is one.

    UserError for a backslash, which makes them take all of it as it stands.
    """
    if "\\" in str(run_dir):
        raise UserError(f"run.dir={run_dir} holds a backslash, which Slurm takes in no log's name; use another run.dir")
    return log_of(Path(str(run_dir).replace("%", "%%")), "%j")


def job_file(
    config: Path,
    overrides: Sequence[str],
    run_dir: Path,
    log: str,
    allocation: Allocation,
    about: Sequence[str] = (),
    home: str = "$SLURM_SUBMIT_DIR",
) -> str:
    """Its text. It calls slurm/run.sh of the folder that it is submitted from; words after the file are overrides.

    `about` is said in comments; `home` is where the folder slurm/ is, as bash reads it within quotes. `log` is a
    pattern of sbatch's, see `log_pattern`: Slurm makes no folder for it, and runs no job whose log it cannot open.
    UserError for a word that would end its line, or that sbatch would take for something else than an option.
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
    words = [str(config), *overrides]
    refuse_hidden([*words, *asked])
    ranks = [] if allocation.gpus else [f"export MEGALLAMA_NPROC_PER_NODE={allocation.ranks_per_node}"]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"# {line}" for line in about),
            *(f"#SBATCH {_quoted(option)}" for option in asked),
            *ranks,
            "# sbatch runs a copy of this file from a spool folder.",
            f'exec bash "{home}/slurm/run.sh" {shlex.join(words)} "$@"',
            "",
        ]
    )


def _quoted(option: str) -> str:
    """An option in a line that begins with #SBATCH. The line is a comment to the shell: what follows it would run.

    As sbatch reads it, which is not as a shell does: a backslash counts within quotes.
    """
    if not option.startswith("-") or option.startswith("--wrap"):
        raise UserError(f"--option={option} is no option of a job file; write one as --option=--partition=gpu")
    return shlex.quote(option).replace("\\", "\\\\")
