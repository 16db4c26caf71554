"""What grows with the number of ranks, measured here and modelled past it.

By number of processes: from the command to the first step, and its processor time; the processor time of a step of a
tiny model, which is Python, hooks and the host's part of collectives; what a save keeps training waiting, and takes;
the first batch of a dataset, and the next ones. To each a constant, a part by rank and a part by the logarithm of the
ranks are fitted, none of them below 0. Past the processes of this machine that is a model. Beside it stands what one
rank of so many computes in a step when its peers are not there: all of its own work, with torch's fake process group,
which fills what is gathered from each rank in turn, and no waiting.

Example: python benchmarks/growth.py --ranks 1 2 4 8
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from loader import mixture_of, write_dataset
from saving import measure as measured_saves
from start import launching

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch, open_data
from megallama.hardware.measure import Peak
from megallama.layout.topology import Topology
from megallama.parallel.fake_world import fake_world
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh, build_mesh
from megallama.parallel.spawn import run_ranks

MODELLED = (64, 1024, 16384)
TURNS = 5
CPU = torch.device("cpu")
LAUNCH, LAUNCHED = "from the command to the first step, s", "processor time of it by rank, s"
STEP = "processor time of a step, ms"
BLOCKED, SAVED = "a save, training waits, ms", "a save, whole, ms"
FIRST_BATCH, BATCH = "data, first batch, ms", "data, a batch, processor time, ms"
ROWS = (LAUNCH, LAUNCHED, STEP, BLOCKED, SAVED, FIRST_BATCH, BATCH)
PARTS: tuple[Callable[[float], float], ...] = (lambda ranks: 1.0, lambda ranks: ranks, math.log2)
"""What costs are fitted as sums of."""


def tiny(ranks: int) -> RunConfig:
    """configs/debug.yaml, with a micro-batch of one sequence for each rank."""
    words = ["train.device=cpu", "train.micro_batch_size=1", f"train.global_batch_size={ranks}"]
    return load_config("configs/debug.yaml", words)


def stepping(launch: Launch, config: RunConfig, steps: int) -> float:
    """Milliseconds of processor time of a step on this rank, the median of some turns."""
    launch.prepare(CPU)
    return step_milliseconds(build_mesh(Topology(dp=launch.world_size), launch, CPU), config, steps)


def step_milliseconds(mesh: ParallelMesh, config: RunConfig, steps: int) -> float:
    """As `stepping`, in a world that stands."""
    from megallama.run_dir.metrics import Metrics
    from megallama.train.run import Run, build_model, draw_weights
    from megallama.train.step import train_step  # brings deepspeed, which looks for a device: after `prepare`

    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine)
    none: Any = None  # a step is given its batches, and saves and heeds nothing
    run = Run(config, mesh, model, engine, none, Metrics([]), none, none, none, none, Peak(1.0, "not used"), None)
    tokens = torch.zeros(1, config.data.sequence_length, dtype=torch.int64)

    def spent() -> float:
        began = time.process_time()
        for _ in range(steps):
            train_step(run, [MicroBatch(tokens, tokens)], 1e-4)
        return 1e3 * (time.process_time() - began) / steps

    spent()
    return median(spent() for _ in range(TURNS))


def alone(ranks: int, steps: int) -> float:
    """Milliseconds of processor time of a step of one rank of so many, whose peers are not there."""
    with fake_world(ranks, 0):
        return stepping(Launch(world_size=ranks, local_world_size=8), tiny(ranks), steps)


def reading(launch: Launch, config: RunConfig, steps: int) -> tuple[float, float]:
    """Milliseconds until this rank has its first batch, and of processor time for each further one."""
    began = time.perf_counter()
    loader = open_data(config, Topology(dp=launch.world_size), launch.rank).train
    loader.step(0)
    first = time.perf_counter() - began
    position, begun = config.train.global_batch_size, time.process_time()
    for step in range(1, steps + 1):
        loader.step(step * position)
    return 1e3 * first, 1e3 * (time.process_time() - begun) / steps


def saving(ranks: int, folder: Path) -> tuple[float, float]:
    """Milliseconds that training waits for a save, and until the checkpoint exists."""
    rounds = run_ranks(measured_saves, ranks, tiny(ranks), CPU, folder, 2, TURNS)[0]
    return 1e3 * median(r.result.blocked_seconds for r in rounds), 1e3 * median(r.result.seconds for r in rounds)


def measured(ranks: int, steps: int, folder: Path) -> dict[str, float]:
    """All rows of so many processes; of a row of each rank the median."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {LAUNCH: launching(ranks, folder)}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found[LAUNCHED] = spent / ranks
    found[STEP] = median(run_ranks(stepping, ranks, tiny(ranks), steps))
    found[BLOCKED], found[SAVED] = saving(ranks, folder / "saves")
    write_dataset(folder / "tokens", 2000, np.random.default_rng(0))
    config = mixture_of(tiny(ranks), {folder / "tokens": 1.0})
    first, each = zip(*run_ranks(reading, ranks, config, 50 * steps), strict=True)
    return found | {FIRST_BATCH: median(first), BATCH: median(each)}


def fitted(ranks: Sequence[int], values: Sequence[float]) -> tuple[float, ...]:
    """The least squares of PARTS with no negative coefficient."""
    columns = np.array([[part(n) for part in PARTS] for n in ranks])
    best, least = (0.0,) * len(PARTS), math.inf
    for size in range(1, len(PARTS) + 1):
        for chosen in combinations(range(len(PARTS)), size):
            found, *_ = np.linalg.lstsq(columns[:, chosen], np.array(values), rcond=None)
            left = float(((columns[:, chosen] @ found - values) ** 2).sum())
            if (found >= 0).all() and left < least * (1 - 1e-9):
                least = left
                best = tuple(float(dict(zip(chosen, found, strict=True)).get(i, 0.0)) for i in range(len(PARTS)))
    return best


def predicted(fit: Sequence[float], ranks: int) -> float:
    """A cost by a fit."""
    return sum(share * part(ranks) for share, part in zip(fit, PARTS, strict=True))


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    ranks = [*report["measured"]]
    heads = [*ranks, "constant", "by rank", "by log2", *(f"{n:,}, by the model" for n in MODELLED)]
    lines = ["| ranks | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for row in ROWS:
        fit = report["fitted"][row]
        values = [report["measured"][n][row] for n in ranks] + fit + [predicted(fit, n) for n in MODELLED]
        lines.append(f"| {row} | " + " | ".join(f"{value:,.3g}" for value in values) + " |")
    lines += ["", "One rank of so many without its peers, processor time of a step, measured:"]
    lines += [f"  {int(n):,} ranks: {value:.1f} ms" for n, value in report["alone"].items()]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="Processes on this machine.")
    parser.add_argument("--steps", type=int, default=20, help=f"Steps in each of {TURNS} turns.")
    parser.add_argument("--json", action="store_true", help="Print a dictionary for scripts.")
    options = parser.parse_args()
    report: dict[str, Any] = {"measured": {}, "alone": {}}
    for ranks in options.ranks:
        with TemporaryDirectory() as folder:
            report["measured"][str(ranks)] = measured(ranks, options.steps, Path(folder))
    for row in ROWS:
        values = [found[row] for found in report["measured"].values()]
        report["fitted"] = report.get("fitted", {}) | {row: [*fitted(options.ranks, values)]}
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # its process group is not this process's
        for ranks in (1, *MODELLED):
            report["alone"][str(ranks)] = pool.apply(alone, (ranks, options.steps))
    print(json.dumps(report, indent=2) if options.json else table(report))


if __name__ == "__main__":
    main()
