"""The run directory: one run at a time, and a record of what runs there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megallama.checkpoint.reading.store import put_aside
from megallama.config.load import dump_config
from megallama.config.schema import RunConfig
from megallama.errors import SharedError, UserError
from megallama.hardware.measure import Peak
from megallama.parallel.mesh import ParallelMesh, driver_versions
from megallama.parallel.plain import from_first
from megallama.run_dir.metrics import Metrics, environment, open_metrics
from megallama.run_dir.outcome import Reached, write_failure, write_outcome
from megallama.run_dir.trackers import WANDB_ID
from megallama.system.lock import RunLock
from megallama.text.tokenizer import Tokenizer


@contextmanager
def locked(config: RunConfig, mesh: ParallelMesh) -> Iterator[RunLock | None]:
    """Make the run directory this run's alone: rank 0 gets the lock. UserError, on every rank, if another holds it."""
    folder, refusal, lock = Path(config.run.dir), "", None
    with ExitStack() as stack:
        if mesh.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(RunLock(folder))
            except OSError as error:
                refusal = f"run.dir={folder} cannot be made ({error.strerror}); use another run.dir"
            except UserError as error:
                refusal = str(error)
        # Until it is this run's, no rank may touch it, not even to say that it has failed.
        if refusal := from_first(refusal, mesh.world.group, mesh.device):
            raise SharedError(refusal)
        yield lock


@contextmanager
def recorded(
    config: RunConfig, mesh: ParallelMesh, tokenizer: Tokenizer, peak: Peak, reached: Reached
) -> Iterator[Metrics]:
    """Record what runs in the run directory, which is locked, and how and at which step it fails if it does.

    Metrics go nowhere on ranks other than 0.
    """
    with _record(config, mesh, tokenizer, peak) if mesh.rank == 0 else Metrics([]) as metrics:
        dist.barrier(mesh.world.group)  # the outcome is this start's: a rank that fails finds where to say so
        try:
            yield metrics
        except BaseException as error:
            failed = f"rank {mesh.rank}: {type(error).__name__}: {error}"
            reason = (str(error) if isinstance(error, UserError) else failed).splitlines()[0]
            write_failure(Path(config.run.dir), reason, reached.step)
            raise


def _record(config: RunConfig, mesh: ParallelMesh, tokenizer: Tokenizer, peak: Peak) -> Metrics:
    folder = Path(config.run.dir)
    if config.checkpoint.resume == "never":
        put_aside(folder)
        (folder / WANDB_ID).unlink(missing_ok=True)
    with ExitStack() as stack:
        metrics = stack.enter_context(open_metrics(config, folder))
        for name in ("stacks", "memory"):  # of an earlier failure: who wrote none now would not be seen
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "config.yaml").write_text(dump_config(config))
        tokenizer.save(folder / "tokenizer")
        device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
        layout, threads = asdict(mesh.topology), torch.get_num_threads()
        versions = {name.removeprefix("the "): found for name, found in driver_versions(mesh.device).items()}
        facts = environment(device=device, threads=threads, topology=layout, peak=asdict(peak), **versions)
        (folder / "environment.json").write_text(json.dumps(facts, indent=2))
        write_outcome(folder, "running", 0, "")
        stack.pop_all()  # nothing failed: they stay open
    return metrics
