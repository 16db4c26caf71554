"""Traces of torch's profiler for the steps that the config lists: what each rank computes and sends, and when."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from megallama.parallel.plain import of_all
from megallama.system.whole_file import temporary
from megallama.train.run import Run

_LEVEL = 5
"""Of gzip: the highest takes several times as long for files that are a fifth smaller."""


@contextmanager
def profiled(run: Run, step: int) -> Iterator[None]:
    """Trace the step inside, where `train.profile` lists it, to a file of each listed rank; every rank must call it.

    All ranks begin the step when the slowest profiler has started, and leave it when the last file is written: neither
    counts in the time of this step or the next. The event `profile` names the files; one that cannot be written is a
    notice, and the run goes on.
    """
    wanted = run.config.train.profile
    if step not in wanted.steps:
        yield
        return
    with run.mesh.clock.span("trace", whole=True):
        profiler = _prepared(run.mesh.device) if run.mesh.rank in wanted.ranks else None
        dist.barrier(run.mesh.world.group)
    if profiler is not None:
        profiler.start_trace()
    yield
    run.watchdog.now("trace", patient=True)
    with run.mesh.clock.span("trace", whole=True):
        failure = "" if profiler is None else _written(profiler, trace_path(run.dir, step, run.mesh.rank))
        failures = of_all(failure, run.mesh.world.group, run.mesh.device)
    ranks = sorted(set(wanted.ranks))
    if paths := [str(trace_path(run.dir, step, rank)) for rank in ranks if not failures[rank]]:
        run.metrics.write("profile", step=step, paths=paths)
    if failed := ", ".join(f"rank {rank} ({failures[rank]})" for rank in ranks if failures[rank]):
        run.metrics.write("notice", text=f"the trace of step {step} is not written on {failed}; the run goes on")


def trace_path(run_dir: Path, step: int, rank: int) -> Path:
    """Where the trace of a step on a rank is."""
    return run_dir / "traces" / f"step_{step:08d}_rank_{rank:05d}.json.gz"


def _prepared(device: torch.device) -> torch.profiler.profile:
    """A profiler that is ready to start: the first of a process takes a second for that, on a GPU several."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    profiler = torch.profiler.profile(activities=activities)
    profiler.prepare_trace()
    return profiler


def _written(profiler: torch.profiler.profile, path: Path) -> str:
    """End a trace and write it, whole or not at all; why it could not be, else nothing."""
    profiler.stop_trace()
    try:
        with tempfile.TemporaryDirectory() as folder:  # beside the processors: a trace is ten times as large unpacked
            plain = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(plain))
            if not _is_whole(plain):  # the profiler says on stderr what went wrong, and raises nothing
                return f"torch's profiler could not write it to {folder}"
            path.parent.mkdir(exist_ok=True)
            _compress(plain, path)
    except OSError as error:
        return str(error.strerror)
    return ""


def _is_whole(trace: Path) -> bool:
    """Whether it ends as JSON of an object does."""
    if not trace.exists():
        return False
    with trace.open("rb") as file:
        file.seek(max(0, trace.stat().st_size - 16))
        return file.read().rstrip().endswith(b"}")


def _compress(trace: Path, path: Path) -> None:
    """To `path`, whole or not at all, piece by piece: a trace of many layers is larger than memory should be."""
    written = temporary(path)
    try:
        with trace.open("rb") as plain, gzip.open(written, "wb", _LEVEL) as packed:
            shutil.copyfileobj(plain, packed, 1 << 20)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
