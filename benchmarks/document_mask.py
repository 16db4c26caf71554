"""Time training steps with `data.document_mask` against steps without, on documents of several mean lengths.

One process on the CPU or on one GPU, random ids, no dataset. One engine takes all kinds of steps by turns. On a CPU the
seconds are those that the processor computes: with one thread, what else the machine does changes them least.

Example: OMP_NUM_THREADS=1 python benchmarks/document_mask.py configs/quickstart.yaml --lengths 32,128,1024 --steps 20
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from contenders.steps import random_batches
from gpu_kernels import synchronize
from rich.console import Console
from rich.table import Table

from megallama.config.load import load_config
from megallama.config.schema import IGNORE_INDEX, RunConfig
from megallama.data.loader import MicroBatch
from megallama.errors import UserError
from megallama.hardware.measure import Peak
from megallama.layout.check import check_config
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh, pick_device

WARMUP = 2
Lengths = Sequence[int | None]
"""Mean tokens of a document; None for steps without a mask."""


def within_documents(batch: MicroBatch, mean_length: int | None, draws: torch.Generator) -> MicroBatch:
    """The micro-batch in documents of that mean length, each of which ends at any token with the same probability."""
    if mean_length is None:
        return batch
    begins = torch.rand(batch.tokens.shape, generator=draws) < 1 / mean_length
    labels = batch.labels.clone()
    labels[:, :-1][begins[:, 1:]] = IGNORE_INDEX
    return replace(batch, labels=labels, documents=begins.cumsum(1).int())


def measure(config: RunConfig, lengths: Lengths, steps: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of each kind, in the order in which they took turns."""
    device = pick_device(config.train.device, 0)
    Launch().prepare(device)
    from megallama.run_dir.metrics import Metrics
    from megallama.train.run import Run, build_model, draw_weights
    from megallama.train.step import train_step  # brings deepspeed, which looks for a device: after `prepare`

    check_config(config, 1)
    mesh = build_mesh(Topology(), Launch(), device)
    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine, Launch().processors)
    none: Any = None  # a step is given its batches, and saves and heeds nothing
    run = Run(config, mesh, model, engine, none, Metrics([]), none, none, none, none, Peak(1.0, "not used"), None)
    draws, batches = torch.Generator().manual_seed(config.train.seed), random_batches(config)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    found: dict[str, list[float]] = {name(length): [] for length in lengths}
    for turn in range(WARMUP + steps):
        given = next(batches)
        for length in lengths if turn % 2 == 0 else list(reversed(lengths)):
            here = [within_documents(batch, length, draws) for batch in given]
            synchronize(device)
            began = clock()
            train_step(run, here, config.optimizer.lr)
            synchronize(device)
            found[name(length)].append(clock() - began)
    return {kind: seconds[WARMUP:] for kind, seconds in found.items()}


def name(mean_length: int | None) -> str:
    """Of a kind of steps."""
    return "no mask" if mean_length is None else f"documents of {mean_length}"


def summary(config: RunConfig, found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median seconds, tokens per second, and the speed as a share of that without a mask: the median over the turns."""
    without = found[name(None)]
    return {
        kind: {
            "seconds": median(seconds),
            "tokens_per_second": config.tokens_per_step / median(seconds),
            "speed": median(plain / masked for plain, masked in zip(without, seconds, strict=True)),
        }
        for kind, seconds in found.items()
    }


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key.sub=value]...")] = None,
    lengths: Annotated[str, typer.Option(help="Mean lengths of documents, in tokens.")] = "32,128,1024",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each kind.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare steps with `data.document_mask` and without."""
    try:
        config = load_config(str(config_path), overrides or [])
        found = summary(config, measure(config, [None, *map(int, lengths.split(","))], steps))
    except UserError as error:
        print(f"document_mask.py: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table("steps", "ms", "tokens/s", "speed against no mask")
    for kind, numbers in found.items():
        seconds, rate = f"{1000 * numbers['seconds']:.0f}", f"{numbers['tokens_per_second']:,.0f}"
        table.add_row(kind, seconds, rate, f"{numbers['speed']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
