"""How often a job has started and got no further: what fails at once must not be started for ever."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megallama.checkpoint.format import step_of, write_json
from megallama.checkpoint.health import healthy_checkpoints
from megallama.system.whole_file import temporary

JOB = "job.json"
"""In the run directory: the job that last ran there."""


@dataclass(frozen=True)
class Starts:
    """The starts of a job since its run's newest checkpoint was new."""

    job: str
    step: int
    """The newest checkpoint's step when the first of them began; 0 if there was none."""
    count: int
    failures: int = 0
    """The starts that failed; the others were ended by Slurm."""

    def again(self, job: str, step: int) -> Starts:
        """One start later, which finds the newest checkpoint at `step`. Another job begins to count anew."""
        if (self.job, self.step) == (job, step):
            return replace(self, count=self.count + 1)
        return Starts(job, step, 1)


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint that is whole and healthy, or 0."""
    return next(map(step_of, healthy_checkpoints(run_dir / "checkpoints")), 0)


def read_starts(run_dir: Path) -> Starts:
    """As the run directory holds them."""
    with suppress(OSError, ValueError, TypeError):
        return Starts(**json.loads((run_dir / JOB).read_text()))
    return Starts("", 0, 0)


def write_starts(run_dir: Path, starts: Starts) -> None:
    """Put them into the run directory."""
    partial = temporary(run_dir / JOB)
    write_json(partial, asdict(starts))
    partial.replace(run_dir / JOB)
