"""A layout search as parts of a plan, and its winner as files that training and Slurm take. Pure but for the files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megallama.cluster.job_file import Allocation, job_file
from megallama.config.load import dump_config
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu
from megallama.layout.batching import dp_size
from megallama.layout.schedules import chunks
from megallama.plan.memory.state import GIB
from megallama.plan.report.table import Part, Row
from megallama.plan.report.time import run_cost, speed
from megallama.plan.search.search import TIE, Candidate, Search
from megallama.plan.time.software import Machine
from megallama.plan.time.step_time import step_time
from megallama.system.lock import beside, output_lock
from megallama.system.new_file import check_new_file, write_new_files

SHOWN = 10
SLOW = 600.0
"""Seconds of a step that nobody would run."""
POOR = 0.2
"""An MFU that nobody would run."""
FEW = 8
"""Micro-batches of a step and copy."""


def search_parts(
    result: Search, on: Machine, tokens: float, price: float | None, *, explain: bool = False
) -> list[Part]:
    """The fastest layouts with the seconds of a step, and why others were rejected; where too, to `explain` it."""
    gpu, best = on.gpu, result.found[:SHOWN]
    rows = [
        Row(f"rank_{number}", one.name, _words(one, on, tokens, price), one.seconds, "s")
        for number, one in enumerate(best, 1)
    ]
    fits, limit = len(result.found), f"{gpu.usable_bytes / GIB:.1f} GiB of {gpu.key}"
    notes = [_tied(result, on), f"{fits:,} of {result.tried:,} layouts are legal and fit in {limit}."]
    notes.append("" if on.mfu is not None else _why_poor(result.found[0], on))
    rejected = []
    for number, (why, places) in enumerate(result.rejected.items(), 1):
        where = "; ".join(f"{place}: {layouts:,}" for place, layouts in places.items())
        rejected.append(Row(f"class_{number}", why, where if explain else "", places.total()))
    title = f"Rejected: {result.tried - fits:,} of {result.tried:,} layouts"
    heading = f"{'Fastest' if on.mfu is None else 'Simplest'} layouts on {result.found[0].world_size} x {gpu.name}"
    return [
        Part("layouts", heading, tuple(rows), " ".join(filter(None, notes))),
        Part("rejected", title, tuple(rejected), "" if explain else "--explain: where they are."),
    ]


def _tied(result: Search, on: Machine) -> str:
    """What is to be said of layouts that are as fast as the fastest."""
    if on.mfu is not None:
        return "All are as fast as --mfu assumes: these are the simplest that fit."
    if result.ties == 1:
        return ""
    shown = f"These are {SHOWN} of {result.ties}" if result.ties > SHOWN else f"The first {result.ties} are"
    fastest = min(result.found[: result.ties], key=lambda one: one.seconds)
    return (
        f"{shown} within {TIE:.0%} of the fastest, which no prediction tells apart: the simplest stands first. "
        f"The fastest is {fastest.name}, {fastest.seconds:.4g} s."
    )


def search_dictionary(result: Search, on: Machine, tokens: float, price: float | None) -> dict[str, Any]:
    """The same for scripts: what each of the fastest layouts is, and each reason with all places that it concerns."""
    return {
        "tried": result.tried,
        "fits": len(result.found),
        "ties": result.ties,
        "usable_bytes": on.gpu.usable_bytes,
        "layouts": {f"rank_{n}": _layout(one, on, tokens, price) for n, one in enumerate(result.found[:SHOWN], 1)},
        "rejected": {
            f"class_{number}": {"reason": why, "places": dict(places), "layouts": places.total()}
            for number, (why, places) in enumerate(result.rejected.items(), 1)
        },
    }


def _layout(one: Candidate, on: Machine, tokens: float, price: float | None) -> dict[str, Any]:
    """`mfu` in per cent, as in the part `speed` of a plan."""
    found, parallel = speed(one.config, one.world_size, on.gpu, one.seconds), one.config.parallel
    cost = run_cost(one.config, one.world_size, on, one.seconds, tokens, price)
    return {
        "tp": parallel.tensor,
        "pp": parallel.pipeline,
        "cp": parallel.context,
        "dp": dp_size(one.config, one.world_size),
        "zero_stage": one.config.zero.stage,
        "schedule": parallel.schedule,
        "chunks": chunks(parallel),
        "micro_batch_size": one.config.train.micro_batch_size,
        "recompute": one.config.train.recompute,
        "seconds": one.seconds,
        "tokens_per_second_per_gpu": found.tokens_per_second_per_gpu,
        "mfu": 100 * found.mfu_full,
        "bytes": one.size,
        "days": cost.hours / 24,
        "gpu_hours": cost.gpu_hours,
        **({} if cost.money is None else {"money": cost.money}),
    }


def _why_poor(best: Candidate, on: Machine) -> str:
    """Why nobody would run even the best; empty where that is not so."""
    config, gpus = best.config, best.world_size
    batch, dp = config.train.global_batch_size, dp_size(config, gpus)
    if best.seconds > SLOW:
        return (
            f"Best of bad: a step takes {best.seconds / 60:.0f} minutes, since train.global_batch_size={batch} makes "
            f"{config.tokens_per_step:,} tokens a step on {gpus} GPUs; take a smaller batch, or more GPUs."
        )
    mfu = speed(config, gpus, on.gpu, best.seconds).mfu_full
    if mfu > POOR:
        return ""
    if batch // dp // config.train.micro_batch_size < FEW and gpus > 1:
        each = "1 sequence" if batch // dp == 1 else f"{batch // dp} sequences"
        why = f"train.global_batch_size={batch} leaves {each} to each of dp {dp} copies"
        return f"Best of bad: an MFU of {mfu:.0%}, since {why}; take a larger batch, or fewer GPUs."
    step = step_time(config, gpus, on)
    terms = ("matmul", "attention", "memory", "tensor", "context", "pipeline", "bubble", "data", "optimizer")
    most = max(terms, key=lambda term: float(getattr(step, term)))
    share = getattr(step, most) / step.total
    return f"Best of bad: an MFU of {mfu:.0%}; {share:.0%} of the step is {most}: the model is small for these GPUs."


@contextmanager
def held_targets(config_path: Path | None, job_path: Path | None) -> Iterator[None]:
    """Keep both files of `write_winner` for this command: before a search, not after it.

    UserError unless they can be made, or while another command is about to write them.
    """
    with ExitStack() as stack:
        for option, path, example in (("--write", config_path, "run.yaml"), ("--sbatch", job_path, "run.sh")):
            if path is not None:
                check_new_file(option, path, example)
                if option == "--sbatch" and config_path is not None and path.resolve() == config_path.resolve():
                    raise UserError(f"--sbatch={path} is the file of --write as well; give another name, as run.sh")
                stack.enter_context(output_lock(beside(path), f"{option}={path}", option))
        yield


def write_winner(winner: Candidate, gpu: Gpu, config_path: Path, job_path: Path | None) -> list[str]:
    """Write the winner's config and, where asked for, a job file for it, or neither; what was written, a line each.

    UserError where a file exists or cannot be written.
    """
    head = f"# {winner.name}, on {winner.world_size} x {gpu.name}: megallama plan --search\n"
    files = {config_path: head + dump_config(winner.config)}
    if job_path is not None:
        per_node = min(winner.world_size, int(gpu.gpus_per_node or 1))
        allocation = Allocation(-(-winner.world_size // per_node), per_node, gpu.kind == "gpu", "7-00:00:00", 300)
        run_dir = Path(winner.config.run.dir).absolute()
        files[job_path] = job_file(config_path.absolute(), (), run_dir, "%x-%j.log", allocation)
    write_new_files({path: text.encode() for path, text in files.items()})
    return [f"wrote {path}" for path in files]


def _words(one: Candidate, on: Machine, tokens: float, price: float | None) -> str:
    found = _layout(one, on, tokens, price)
    money = f", costs {found['money']:,.0f}" if "money" in found else ""
    rate = f"{found['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU, MFU {found['mfu']:.1f}%"
    return f"{one.size / GIB:.1f} GiB, {rate}, {found['days']:.3g} days{money}"
