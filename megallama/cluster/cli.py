"""`megallama launch`: the Slurm job of a run, from its file to its end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megallama.cluster.job_file import JOB_FILE, Allocation, job_file, log_of, log_pattern
from megallama.cluster.queue import Job, cancel_waiting, my_jobs, of_run, submit
from megallama.cluster.starts import read_starts
from megallama.errors import UserError, printable
from megallama.layout.budget import total_steps
from megallama.run_dir.outcome import OUTCOME, STOP_FILE
from megallama.system.lock import beside, output_lock
from megallama.system.whole_file import put

if TYPE_CHECKING:
    from megallama.config.schema import RunConfig

POLL_SECONDS = 2.0
_STOPPING = {"PENDING": "it waited, and is cancelled", "RUNNING": "it is asked to save and end"}


def launch(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    nodes: Annotated[int | None, typer.Option(help="Number of nodes. Default: one copy of the model.", min=1)] = None,
    per_node: Annotated[int, typer.Option(help="Ranks and GPUs per node.", min=1)] = 8,
    limit: Annotated[str, typer.Option("--time", help="Time limit of a start, in Slurm's format.")] = "7-00:00:00",
    signal_seconds: Annotated[int, typer.Option(help="Save this many seconds before the limit.", min=30)] = 300,
    option: Annotated[list[str] | None, typer.Option(help="sbatch option, such as --option=--partition=gpu.")] = None,
    chain: Annotated[int, typer.Option(help="Number of jobs in a chain, for clusters without requeueing.", min=1)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job file, submit nothing.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Print the status of the run's jobs.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print rank 0's log until the run's jobs end.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Make the run save and end, and cancel waiting jobs.")] = False,
) -> None:
    """Submit a run as a Slurm job. With the same CONFIG, print its status, follow its log, or stop it.

    Run it from the root of a checkout. Example: megallama launch configs/7b.yaml --nodes 16 --option=--partition=gpu
    """
    # The schema takes a quarter of a second to import, which no other command need wait for.
    from megallama.checkpoint.state import seen_before
    from megallama.cluster.job import check_resume
    from megallama.config.load import load_config
    from megallama.layout.check import check_training
    from megallama.layout.frozen import checkpoint_bytes
    from megallama.run_dir.limits import check_run_dir

    config = load_config(config_path, overrides or ())
    run_dir = Path(config.run.dir).absolute()
    if sum((dry_run, status, follow, stop)) > 1:
        raise UserError("--dry-run, --status, --follow and --stop do not go together; give one")
    if status:
        print_status(config, run_dir)
    elif follow:
        for text in followed(run_dir):
            typer.echo(text, nl=False)
    elif stop:
        end_run(run_dir)
    else:
        check_resume(config)
        ranks = config.parallel.model_ranks
        asked = nodes or -(-ranks // per_node)
        check_training(config, asked * per_node, seen_before(config))
        allocation = Allocation(
            asked, per_node, config.train.device != "cpu", limit, signal_seconds, tuple(option or ())
        )
        text = job_file(config_path, overrides or (), run_dir, log_pattern(run_dir), allocation)
        if dry_run:
            typer.echo(text, nl=False)
        else:
            check_run_dir(Path(config.run.dir), checkpoint_bytes(config))
            send(run_dir, text, chain)


def send(run_dir: Path, text: str, chain: int) -> None:
    """Write the job file and submit it, `chain` times. UserError where the run has a job, or is getting one."""
    if not Path("slurm/run.sh").is_file():
        raise UserError(f"{Path.cwd()} has no slurm/run.sh; go to the root of a checkout of megallama")
    path = run_dir / JOB_FILE
    with output_lock(beside(path), f"{JOB_FILE} of run.dir={run_dir}", "run.dir"):
        waiting = jobs_of(run_dir)
        if waiting:
            raise UserError(
                f"run.dir={run_dir} has job {waiting[0].id} ({waiting[0].state}) already; see it with --status, "
                "end it with --stop, or use another run.dir"
            )
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        put(path, text.encode())
        in_a_row = ["--dependency=singleton"] if chain > 1 else []
        sent = [submit(*in_a_row, str(path)) for _ in range(chain)]
    typer.echo(f"job {', '.join(sent)}: {path}; its log is {log_of(run_dir, sent[0])}")


def jobs_of(run_dir: Path) -> list[Job]:
    """The jobs of the run that wait or run."""
    return of_run(my_jobs(), run_dir / JOB_FILE, read_starts(run_dir).job)


def print_status(config: RunConfig, run_dir: Path) -> None:
    """A line for each job, one for how far the run is."""
    jobs = jobs_of(run_dir)
    for job in jobs:
        where = f"on {job.nodes} for {job.time_used} of {job.time_limit}" if job.nodes else f"({job.reason})"
        typer.echo(f"job {job.id}  {job.state} {where}, restarts {job.restarts}")
    if not jobs:
        typer.echo(f"no job of {run_dir} waits or runs")
    typer.echo(reached(config, run_dir))
    typer.echo(_ending(run_dir))


def reached(config: RunConfig, run_dir: Path) -> str:
    """How far the run is."""
    from megallama.checkpoint.state import newest_seen

    seen = newest_seen(config)
    return f"newest checkpoint: step {seen.step} of {total_steps(config, seen)}"


def _ending(run_dir: Path) -> str:
    with suppress(OSError, ValueError, KeyError):
        outcome = json.loads((run_dir / OUTCOME).read_text())
        reason = f": {printable(outcome['reason'])}" if outcome["reason"] else ""
        return f"last start: {outcome['status']} at step {outcome['step']}{reason}"
    return "it has not begun to train"


def followed(run_dir: Path) -> Iterator[str]:
    """What rank 0 prints in the newest start and those that follow; ends with the run's last job."""
    path, read = None, 0
    while True:
        jobs = jobs_of(run_dir)
        found = newest_log(run_dir)
        if found != path:
            path, read = found, 0
        if path is not None:
            with path.open(errors="replace") as file:
                file.seek(read)
                text = file.read()
                read = file.tell()
            yield text
        if not jobs:
            yield f"no job of {run_dir} waits or runs; {_ending(run_dir)}\n"
            return
        time.sleep(POLL_SECONDS)


def newest_log(run_dir: Path) -> Path | None:
    """Rank 0's of the start that began last."""
    logs = (run_dir / "logs").glob("*-rank0.log")
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def end_run(run_dir: Path) -> None:
    """Cancel the jobs that wait, ask the one that runs to save and end, and wait until it has."""
    if not jobs_of(run_dir):
        raise UserError(f"no job of run.dir={run_dir} waits or runs; {_ending(run_dir)}")
    told: set[tuple[str, str]] = set()
    while jobs := jobs_of(run_dir):
        for job in jobs:
            if job.state == "PENDING":
                cancel_waiting(job.id)
            elif job.state == "RUNNING":
                # Again and again: a start that has not begun to train takes an older file for its predecessor's.
                (run_dir / STOP_FILE).touch()
            if (job.id, job.state) not in told:
                told.add((job.id, job.state))
                typer.echo(f"job {job.id}: {_STOPPING.get(job.state, f'waiting, it is {job.state}')}")
        time.sleep(POLL_SECONDS)
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    typer.echo(_ending(run_dir))
