"""What a save costs a run that trains on while it is written: how long it waits, and how much longer its steps take.

A round is `--steps` training steps of the config without a save, and as many with one that is requested before the
first of them. All rounds run in the same processes, back and forth. The round with the save ends when its steps are
done and the checkpoint exists. A synchronous save, training idle, is what the waiting is compared with; the processor
time of the processes that write, divided by the cores, is what the added time is compared with. Tokens are random.

Example: python benchmarks/saving.py configs/110m.yaml train.device=cpu train.dtype=fp32 data.sequence_length=128 \\
    train.micro_batch_size=1 train.global_batch_size=1
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from megallama.checkpoint.state import DataIdentity, TrainState, state_document
from megallama.checkpoint.writing.commit import Retention
from megallama.checkpoint.writing.saver import Saver, SaveResult
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.errors import UserError, refusing
from megallama.layout.check import check_config
from megallama.layout.counts import count_parameters
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh, pick_device
from megallama.parallel.spawn import run_ranks

MOST_BLOCKED = 0.15
"""Of a synchronous save, that training may wait."""
MOST_ADDED = 1.5
"""Times the writers' processor seconds over the cores, that a save may add to training."""
MOST_SECONDS = 120.0
"""From the request to the checkpoint."""
RANK_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Round:
    """One without a save and one with."""

    plain_seconds: float
    saving_seconds: float
    synchronous_seconds: float
    result: SaveResult

    @property
    def added_seconds(self) -> float:
        """By the save."""
        return self.saving_seconds - self.plain_seconds


def measure(
    launch: Launch, config: RunConfig, device: torch.device, folder: Path, steps: int, rounds: int
) -> list[Round]:
    """As one rank of the job sees it."""
    launch.prepare(device)
    from megallama.train.run import (
        build_model,
        draw_weights,
    )  # brings deepspeed with it, which looks for a device: after `prepare`

    batching, parallel = check_config(config, launch.world_size), config.parallel
    mesh = build_mesh(Topology(dp=batching.dp_size, **parallel.sizes), launch, device)
    count = batching.gradient_accumulation_steps
    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine)
    saver = Saver(folder, engine, model, mesh, Retention(keep=1))
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    tokens = torch.randint(config.model.vocab_size, shape, device=device)
    scale = torch.tensor(1.0 / tokens.numel(), device=device)
    number = 0

    def train() -> None:
        for _ in range(steps):
            engine.forward_backward([MicroBatch(tokens, tokens)] * count, scale)
            engine.step(1e-4)

    def save() -> None:
        nonlocal number
        number += 1
        saver.save(number, state_document(TrainState(number), 0.0, True, DataIdentity("", 0), config.model, {}))

    def timed(*parts: Any) -> float:
        dist.barrier(mesh.world.group)
        began = time.perf_counter()
        for part in parts:
            part()
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(mesh.world.group)
        return time.perf_counter() - began

    found = []
    timed(train, save, saver.wait)
    for index in range(rounds):
        synchronous = timed(save, saver.wait)
        saver.take_results()
        if index % 2:
            saving, plain = timed(save, train, saver.wait), timed(train)
        else:
            plain, saving = timed(train), timed(save, train, saver.wait)
        found.append(Round(plain, saving, synchronous, saver.take_results()[-1]))
    saver.close()
    return found


def summary(config_path: Path, config: RunConfig, ranks: int, steps: int, rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios that are bounded."""
    cores = len(os.sched_getaffinity(0))
    added = [r.added_seconds / (r.result.cpu_seconds / cores) for r in rounds]
    return {
        "config": str(config_path),
        "parameters": count_parameters(config.model).total,
        "dtype": config.train.dtype,
        "ranks": ranks,
        "cores": cores,
        "steps": steps,
        "rounds": len(rounds),
        "step_seconds": median(r.plain_seconds for r in rounds) / steps,
        "synchronous_seconds": median(r.synchronous_seconds for r in rounds),
        "blocked_seconds": median(r.result.blocked_seconds for r in rounds),
        "committed_seconds": max(r.result.seconds for r in rounds),
        "writer_cpu_seconds": median(r.result.cpu_seconds for r in rounds),
        "added_seconds": median(r.added_seconds for r in rounds),
        "blocked_ratio": median(r.result.blocked_seconds / r.synchronous_seconds for r in rounds),
        "added_ratio": median(added),
        "added_ratio_quartiles": quantiles(added)[::2] if len(added) > 1 else [added[0]] * 2,
        "added_rounds": [r.added_seconds for r in rounds],
    }


def print_report(report: dict[str, Any]) -> None:
    """A line for each number."""
    table = Table(
        title=f"{report['config']}: {report['parameters']:,} parameters, {report['dtype']}, ranks: {report['ranks']}, "
        f"{report['cores']} cores"
    )
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("at most", justify="right")
    table.add_row("a training step", f"{report['step_seconds']:.2f}", "", "")
    table.add_row("a synchronous save", f"{report['synchronous_seconds']:.2f}", "", "")
    blocked, added = f"{report['blocked_ratio']:.3f}", f"{report['added_ratio']:.2f}"
    table.add_row("training waits", f"{report['blocked_seconds']:.3f}", blocked, f"{MOST_BLOCKED} of it")
    table.add_row("the writers compute", f"{report['writer_cpu_seconds']:.2f}", "", "")
    table.add_row("training takes longer by", f"{report['added_seconds']:.2f}", added, f"{MOST_ADDED} of that / cores")
    low, high = report["added_ratio_quartiles"]
    table.add_row("", "", f"{low:.2f} - {high:.2f}", "half of the rounds")
    table.add_row(
        "request to checkpoint, the longest", f"{report['committed_seconds']:.1f}", "", f"{MOST_SECONDS:.0f} s"
    )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file of a run; its data is not read.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    ranks: Annotated[int, typer.Option(help="Processes on this machine; more than one only on the CPU.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Training steps per round; they must take longer than a save.", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="Number of rounds; use many, since steps vary.", min=1)] = 11,
    folder: Annotated[Path | None, typer.Option(help="Where to write. Default: the system's temporary folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how much a save slows down training.

    Exit code 1 if a bound is exceeded. Example: python benchmarks/saving.py configs/110m.yaml data.sequence_length=128
    """
    config = load_config(config_path, overrides or [])
    check_config(config, ranks)
    device = pick_device(config.train.device, 0)
    if ranks > 1 and device.type == "cuda":
        raise UserError(f"--ranks={ranks} is for the CPU; add train.device=cpu, or use --ranks=1")
    with tempfile.TemporaryDirectory(prefix="megallama-saving-", dir=folder) as temporary:
        arguments = (config, device, Path(temporary).absolute(), steps, rounds)
        if ranks > 1:
            found = run_ranks(measure, ranks, *arguments, timeout=RANK_TIMEOUT)[0]
        else:
            with redirect_stdout(sys.stderr):  # what libraries print must not mix with the report
                found = measure(Launch(), *arguments)
    report = summary(config_path, config, ranks, steps, found)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    kept = (
        report["blocked_ratio"] <= MOST_BLOCKED
        and report["added_ratio"] <= MOST_ADDED
        and report["committed_seconds"] <= MOST_SECONDS
    )
    raise typer.Exit(0 if kept else 1)


if __name__ == "__main__":
    with refusing():
        typer.run(main)
