"""A layout search as parts of a plan, and its winner as files that training and Slurm take. Pure but for the files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megallama.cluster.job_file import Allocation, job_file
from megallama.config.load import dump_config
from megallama.errors import UserError
from megallama.layout.check import dp_size
from megallama.layout.schedules import chunks
from megallama.plan.hardware import Gpu
from megallama.plan.memory.fit import usable_bytes
from megallama.plan.memory.lines import GIB
from megallama.plan.report.new_file import check_new_file, write_new_files
from megallama.plan.report.table import Part, Row
from megallama.plan.search.search import Candidate, Search
from megallama.plan.sizing.cost import speed
from megallama.system.lock import beside, output_lock

SHOWN = 10
MOST_PLACES = 6


def search_parts(result: Search, gpu: Gpu) -> list[Part]:
    """The fastest layouts with the seconds of a step, and what was rejected with how many layouts it rules out."""
    best = result.found[:SHOWN]
    rows = [Row(f"rank_{number}", one.name, _words(one, gpu), one.seconds, "s") for number, one in enumerate(best, 1)]
    fits, limit = len(result.found), f"{usable_bytes(gpu) / GIB:.1f} GiB of {gpu.key}"
    note = f"{fits:,} of {result.tried:,} layouts are legal and fit in {limit}; {result.tried - fits:,} are rejected."
    rejected = [
        Row(f"class_{number}", _several(rejection.places), why, rejection.layouts)
        for number, (why, rejection) in enumerate(result.rejected.items(), 1)
    ]
    title = f"Rejected: {result.tried - fits:,} of {result.tried:,} layouts"
    return [
        Part("layouts", f"Fastest layouts on {result.found[0].world_size} x {gpu.name}", tuple(rows), note),
        Part("rejected", title, tuple(rejected)),
    ]


def search_dictionary(result: Search, gpu: Gpu) -> dict[str, Any]:
    """The same for scripts: what each of the fastest layouts is, and each reason with all places that it concerns."""
    return {
        "tried": result.tried,
        "fits": len(result.found),
        "usable_bytes": usable_bytes(gpu),
        "layouts": {f"rank_{number}": _layout(one, gpu) for number, one in enumerate(result.found[:SHOWN], 1)},
        "rejected": {
            f"class_{number}": {"reason": why, "places": rejection.places, "layouts": rejection.layouts}
            for number, (why, rejection) in enumerate(result.rejected.items(), 1)
        },
    }


def _layout(one: Candidate, gpu: Gpu) -> dict[str, Any]:
    """`mfu` in per cent, as in the part `speed` of a plan."""
    found, parallel = speed(one.config, one.world_size, gpu, one.seconds), one.config.parallel
    return {
        "tp": parallel.tensor,
        "pp": parallel.pipeline,
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
    }


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
    text = (
        f"# {winner.name}, on {winner.world_size} x {gpu.name}: megallama plan --search\n{dump_config(winner.config)}"
    )
    files = {config_path: text}
    if job_path is not None:
        per_node = min(winner.world_size, int(gpu.gpus_per_node or 1))
        allocation = Allocation(-(-winner.world_size // per_node), per_node, gpu.kind == "gpu", "7-00:00:00", 300)
        run_dir = Path(winner.config.run.dir).absolute()
        files[job_path] = job_file(config_path.absolute(), (), run_dir, "%x-%j.log", allocation)
    write_new_files({path: text.encode() for path, text in files.items()})
    return [f"wrote {path}" for path in files]


def _words(one: Candidate, gpu: Gpu) -> str:
    found = speed(one.config, one.world_size, gpu, one.seconds)
    return (
        f"{one.size / GIB:.1f} GiB, {found.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, MFU {found.mfu_full:.1%}"
    )


def _several(places: list[str]) -> str:
    rest = len(places) - MOST_PLACES
    return "; ".join(places[:MOST_PLACES]) + (f"; and {rest} more" if rest > 0 else "")
