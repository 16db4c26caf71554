"""What slurm/run.sh has to decide: may this start train, which nodes may not, and what comes after it.

`python -m megallama.cluster.job begin|nodes|after ...`: the answer is on stdout, for the shell, its reason on stderr,
for the job's log. Imports no torch: it runs on a node before anything is known of that node.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megallama.checkpoint.format import complete_checkpoints
from megallama.checkpoint.health import is_healthy
from megallama.checkpoint.state import newest_seen
from megallama.cluster.job_file import log_pattern
from megallama.cluster.starts import Starts, newest_step, read_starts, write_starts
from megallama.cluster.verdict import bad_nodes, read_reports, refuse_apart
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError, printable
from megallama.layout.budget import total_steps
from megallama.layout.check import check_training
from megallama.layout.frozen import checkpoint_bytes
from megallama.run_dir.limits import check_run_dir
from megallama.run_dir.outcome import BY_STOP_FILE, OUTCOME

MOST_FAILURES = 3
MOST_STARTS = 20
"""The most starts of a job, those that Slurm ended by preemption or with a node included."""
REQUEUE, END = "requeue", "end"


def begin(arguments: argparse.Namespace) -> None:
    """Count this start and print the run directory, or nothing where the run is done.

    UserError where config and allocation do not go together, or where starting again has led nowhere.
    """
    nodes, per_node = arguments.nodes, arguments.ranks_per_node
    config = load_config(arguments.config, arguments.overrides)
    run_dir = Path(config.run.dir).absolute()
    log_pattern(run_dir)
    check_run_dir(Path(config.run.dir), checkpoint_bytes(config))
    check_resume(config)
    seen = newest_seen(config)
    try:
        check_training(config, nodes * per_node, seen)
    except UserError as error:
        raise UserError(f"{nodes} nodes of {per_node} ranks: {error}") from None
    steps = total_steps(config, seen)
    if seen.step >= steps and _goes_on_from_newest(config):
        print(f"{run_dir} has done all {steps} steps", file=sys.stderr)
        return
    starts = read_starts(run_dir).again(_job(), newest_step(run_dir))
    if starts.count > MOST_STARTS or starts.failures >= arguments.most_failures:
        raise UserError(_led_nowhere(starts, run_dir))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_starts(run_dir, starts)
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written ({error.strerror}); use another run.dir") from None
    print(run_dir)


def check_resume(config: RunConfig) -> None:
    """UserError for a job that would begin its run anew each time that Slurm starts it again."""
    if config.checkpoint.resume == "never":
        raise UserError(
            "checkpoint.resume=never would begin the run anew each time that Slurm starts the job again; use another "
            f"run.dir than {config.run.dir}, or move what is there away"
        )


def _goes_on_from_newest(config: RunConfig) -> bool:
    """Whether a start continues the newest checkpoint, and goes back to none before it."""
    newest = next(iter(complete_checkpoints(Path(config.run.dir) / "checkpoints")), None)
    return config.checkpoint.resume in ("auto", "must") and newest is not None and is_healthy(newest)


def nodes(arguments: argparse.Namespace) -> None:
    """Print the nodes that the job can do without and must, one a line. Exit code 1 where none has answered.

    UserError where the fault is not a node's: then other nodes would not help.
    """
    reports = read_reports(arguments.report)
    if not reports:
        print(f"no node answered; see {arguments.report}", file=sys.stderr)
        sys.exit(1)  # not for what one of them is: their step could not begin
    expected = arguments.expected.split(",")
    refuse_apart(reports, expected, arguments.token)
    bad = bad_nodes(reports, expected)
    for node, reasons in bad.items():
        print(node)
        print(f"{node} cannot take part: {printable('; '.join(reasons))}", file=sys.stderr)
    if len(bad) > 1 and 2 * len(bad) > len(expected):
        first = next(iter(bad))
        raise UserError(
            f"{len(bad)} of {len(expected)} nodes cannot take part, as {first}: {'; '.join(bad[first])}; "
            "mend what they share, then submit again"
        )


def after(arguments: argparse.Namespace) -> None:
    """Print `requeue`, or `end` and the exit code, for a start that the launchers left with `--code`."""
    run_dir, code = arguments.run_dir, arguments.code
    outcome = _outcome(run_dir)
    status, reason = outcome["status"], outcome["reason"]
    if status in ("done", "stopped"):
        print(END, 0)
    elif status == "requeue" and reason == BY_STOP_FILE and not arguments.signalled:
        print(END, 0)
        print("stopped by the file STOP: submit the job again to go on", file=sys.stderr)
    elif status == "requeue" or _may_fail_again(run_dir, arguments.most_failures):
        print(REQUEUE)
        print(f"start again: {printable(reason)}", file=sys.stderr)
    else:
        print(END, code or 1)
        why = f"{_led_nowhere(read_starts(run_dir), run_dir)}; the last one: {reason}"
        print(f"megallama: {printable(why)}", file=sys.stderr)


def _may_fail_again(run_dir: Path, most_failures: int) -> bool:
    """Count a failure; whether there is a newer checkpoint than at the first start, or not yet `most_failures`."""
    starts = read_starts(run_dir)
    if newest_step(run_dir) > starts.step:
        return True
    write_starts(run_dir, replace(starts, failures=starts.failures + 1))
    return starts.failures + 1 < most_failures


def _outcome(run_dir: Path) -> dict[str, str]:
    """How this start ended, by its own words."""
    try:
        found = json.loads((run_dir / OUTCOME).read_text())
        mine = (found["job"], found["restart"]) == (_job(), int(os.environ.get("SLURM_RESTART_COUNT", 0)))
    except (OSError, ValueError, KeyError):
        mine = False
    if not mine:
        return {"status": "failed", "reason": "it ended before it began to train"}
    if found["status"] == "running":
        return {"status": "failed", "reason": "it was killed"}
    return {"status": found["status"], "reason": found["reason"]}


def _led_nowhere(starts: Starts, run_dir: Path) -> str:
    return (
        f"job {starts.job} was started {starts.count} times, failed {starts.failures} times, and made no checkpoint "
        f"after step {starts.step}; see {run_dir}/logs, then submit it again"
    )


def _job() -> str:
    return os.environ["SLURM_JOB_ID"]


def main(words: Sequence[str] | None = None) -> None:
    """Parse and delegate."""
    parser = argparse.ArgumentParser(prog="megallama.cluster.job", description=__doc__)
    commands = parser.add_subparsers(required=True)
    most_failures = int(os.environ.get("MEGALLAMA_MOST_FAILURES", MOST_FAILURES))

    command = commands.add_parser("begin")
    command.add_argument("--nodes", type=int, required=True)
    command.add_argument("--ranks-per-node", type=int, required=True)
    command.add_argument("config")
    command.add_argument("overrides", nargs="*")
    command.set_defaults(call=begin, most_failures=most_failures)

    command = commands.add_parser("nodes")
    command.add_argument("--token", type=Path, required=True)
    command.add_argument("--expected", required=True, help="their names, comma-separated, the first one first")
    command.add_argument("report", type=Path, help="what the nodes printed")
    command.set_defaults(call=nodes)

    command = commands.add_parser("after")
    command.add_argument("--code", type=int, required=True)
    command.add_argument("--signalled", action="store_true", help="Slurm asked for the stop, by a signal")
    command.add_argument("run_dir", type=Path)
    command.set_defaults(call=after, most_failures=most_failures)

    arguments = parser.parse_args(words)
    try:
        arguments.call(arguments)
    except UserError as error:
        print(f"megallama: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
