"""Time what a run pays for watching itself: steps with the default monitoring beside steps without, by turns.

With it, a step times what it does on every rank, judges its loss and norm (`health.spike_deviations`) and writes a
`train` event to metrics.jsonl and to a log. The pairs take turns in who is first. One process or several on the CPU, or
one GPU each; random ids, no dataset. Of one process on the CPU the seconds are those that the processor computes, since
all of this is work of its own: what else the machine does changes them least.

Example: OMP_NUM_THREADS=1 python benchmarks/monitoring.py configs/quickstart.yaml train.micro_batch_size=4 --ranks 2
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from contenders.steps import random_batches
from gpu_kernels import synchronize

from megallama.checkpoint.state import TrainState
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.hardware.measure import Peak
from megallama.layout.check import check_config
from megallama.layout.topology import Topology
from megallama.parallel.clock import Clock, Marks
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh, pick_device
from megallama.parallel.spawn import run_ranks

WARMUP = 3


class SwitchedClock(Clock):
    """A clock that can be without effect."""

    on = True

    def span(self, name: str, *, whole: bool = False) -> AbstractContextManager[None]:
        return super().span(name, whole=whole) if self.on else nullcontext()

    def take(self) -> Marks:
        return super().take() if self.on else []


def measure(launch: Launch, config: RunConfig, folder: Path, pairs: int) -> list[tuple[float, float]]:
    """Seconds of a step without monitoring and of one with it, of each pair, on this rank."""
    device = pick_device(config.train.device, launch.local_rank)
    launch.prepare(device)
    from megallama.run_dir.metrics import Metrics, open_metrics
    from megallama.train.run import Run, build_model, build_spikes, draw_weights  # bring deepspeed: after `prepare`
    from megallama.train.step import train_step
    from megallama.train.step_timer import StepTimer
    from megallama.train.stragglers import Stragglers
    from megallama.train.train_event import write_train_event

    copies = check_config(config, launch.world_size).dp_size
    mesh = build_mesh(Topology(dp=copies, **config.parallel.sizes), launch, device)
    clock: Any = mesh.clock
    clock.__class__ = SwitchedClock
    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine, launch.processors)
    peak = Peak(1e12, "not used")
    # A step is given its batches, and saves and heeds nothing; of the data, an event asks whether they are a mixture.
    unused: Any = SimpleNamespace(train=SimpleNamespace(source=None))
    bare = Run(config, mesh, model, engine, unused, Metrics([]), unused, unused, unused, unused, peak, None)
    metrics = open_metrics(config, folder) if launch.rank == 0 else Metrics([])
    watched = replace(bare, metrics=metrics, spikes=build_spikes(config, mesh))
    batches, state, batch = random_batches(config), TrainState(), config.train.global_batch_size

    timer = StepTimer(Stragglers([0] * launch.world_size))
    # Several wait for each other, which costs time as well.
    alone = launch.world_size == 1 and device.type == "cpu"
    now = time.process_time if alone else time.perf_counter

    def seconds(run: Run) -> float:
        nonlocal state
        clock.on = run is watched
        micro_batches = next(batches)[: batch // (config.train.micro_batch_size * copies)]
        synchronize(device)
        began = now()
        with timer:
            step = train_step(run, micro_batches, config.optimizer.lr)
        state = state.after(batch, applied=step.applied)
        if run is watched:
            timer.all_ranks(step.seconds)
            write_train_event(run, state, batch, step, config.optimizer.lr, timer)
        synchronize(device)
        return now() - began

    found = []
    with metrics, Path(os.devnull).open("w") as log, redirect_stdout(log):
        for pair in range(WARMUP + pairs):
            if pair % 2:
                with_it = seconds(watched)
                without = seconds(bare)
            else:
                without = seconds(bare)
                with_it = seconds(watched)
            found.append((without, with_it))
    return found[WARMUP:]


def main(
    config: Annotated[Path, typer.Argument(help="Of the model and the batch.")] = Path("configs/quickstart.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE ...")] = None,
    ranks: Annotated[int, typer.Option(help="Processes; what `parallel` leaves is data-parallel.", min=1)] = 1,
    pairs: Annotated[int, typer.Option(help="Pairs of steps.", min=1)] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the median difference of a pair as a share of a step without monitoring."""
    run = load_config(config, [*(overrides or ()), "data.path=none", "train.steps=1000000"])
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(measure, ranks, run, Path(folder), pairs, timeout=3600.0)[0]
    step = median(without for without, _ in found)
    extra = median(with_it - without for without, with_it in found)
    facts = {"ranks": ranks, "pairs": pairs, "step_seconds": step, "monitoring_seconds": extra, "share": extra / step}
    shown = f"{ranks} ranks, {pairs} pairs: a step takes {step:.4g} s, monitoring {1e3 * extra:+.2f} ms more"
    shown += f", {extra / step:+.2%}"
    typer.echo(json.dumps(facts) if as_json else shown)


if __name__ == "__main__":
    typer.run(main)
