"""Load a checkpoint that was saved at tensor parallel 2 on one rank, beside one that was saved at tensor parallel 1.

The contenders whose files any layout loads: megallama's, and torch's Distributed Checkpoint. Both checkpoints are saved
first; then all loads take turns in one process. Every part of every tensor must be what the rank that saved it had, to
the bit. Loads come from the page cache.

Example: python benchmarks/resharding.py configs/110m.yaml train.dtype=fp32 --rounds 5
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from checkpoint import RANK_TIMEOUT, build, check_disk, checksum, forget, meet, timed
from contenders.checkpoints import of_any_layout
from rich.console import Console
from rich.table import Table

from megallama.checkpoint.logical import logical_state
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import refusing
from megallama.layout.check import check_config
from megallama.layout.counts import count_parameters
from megallama.parallel.launch import Launch
from megallama.parallel.spawn import run_ranks

SAVED_AT = (1, 2)
"""Sizes of tensor parallel."""
CPU = torch.device("cpu")
Part = tuple[str, tuple[slice, ...], int]
"""Name of a tensor, a box in it, and the checksum of what is there."""
Seconds = dict[str, dict[int, list[float]]]
"""Of every load, by contender and by the size at which it was saved."""


def save(launch: Launch, config: RunConfig, folder: Path) -> list[Part]:
    """What this rank had and saved into the folder of each contender."""
    engine, model, mesh = build(launch, config, CPU)
    for name, contender in of_any_layout(engine, model, mesh, folder).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        contender.save(folder / name)
        contender.wait()
    meet(mesh)
    return [
        (
            name,
            tuple(slice(start, start + size) for start, size in zip(offset, chunk.shape, strict=True)),
            checksum(chunk),
        )
        for name, tensor in logical_state(engine.fragments(), model.shard_slices).items()
        for offset, chunk in tensor.chunks.items()
    ]


def load(launch: Launch, config: RunConfig, folder: Path, saved: Mapping[int, Sequence[Part]], rounds: int) -> Seconds:
    """How long one rank, which holds every tensor whole, takes for each checkpoint under `folder`."""
    engine, model, mesh = build(launch, config, CPU)
    whole = {
        name: chunk
        for name, tensor in logical_state(engine.fragments(), model.shard_slices).items()
        for chunk in tensor.chunks.values()
    }
    found = of_any_layout(engine, model, mesh, folder)
    seconds: Seconds = {name: {size: [] for size in saved} for name in found}
    turns = [(name, size) for name in found for size in saved]
    for number in range(rounds):
        for name, size in turns if number % 2 == 0 else reversed(turns):
            forget(engine)
            seconds[name][size].append(timed(partial(found[name].load, folder / str(size) / name), mesh))
            if any(checksum(whole[tensor][box]) != expected for tensor, box, expected in saved[size]):
                raise RuntimeError(f"{name} loaded something else than was saved at tensor parallel {size}")
    return seconds


def summary(config_path: Path, config: RunConfig, seconds: Seconds) -> dict[str, Any]:
    """Medians over the rounds, and the median of the ratio in each."""
    return {
        "config": str(config_path),
        "parameters": count_parameters(config.model).total,
        "torch": torch.__version__,
        "rounds": len(seconds["megallama"][1]),
        "contenders": {
            name: {
                "same_seconds": median(mine[1]),
                "resharded_seconds": median(mine[2]),
                "ratio": median(b / a for a, b in zip(mine[1], mine[2], strict=True)),
            }
            for name, mine in seconds.items()
        },
    }


def print_report(report: dict[str, Any]) -> None:
    """A line for each contender."""
    table = Table(title=f"{report['config']}: {report['parameters']:,} parameters, loaded by one rank")
    for column in ("contender", "saved at tp 1, s", "saved at tp 2, s", "ratio"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, mine in report["contenders"].items():
        table.add_row(name, *(f"{mine[key]:.2f}" for key in ("same_seconds", "resharded_seconds", "ratio")))
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(f"torch {report['torch']}; medians of {report['rounds']} rounds", highlight=False)


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file of a run; its data is not read.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    rounds: Annotated[int, typer.Option(help="Loads of each checkpoint.", min=1)] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where to write. Default: the system's temporary folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time loading at tensor parallel 1 what was saved at 2, on the CPU.

    Example: python benchmarks/resharding.py configs/110m.yaml train.dtype=fp32 --rounds 5
    """
    words = (*(overrides or []), "train.device=cpu")
    configs = {size: load_config(config_path, [*words, f"parallel.tensor={size}"]) for size in SAVED_AT}
    for size, config in configs.items():
        check_config(config, size)
    where = folder or Path(tempfile.gettempdir())
    check_disk(where, 2 * len(SAVED_AT) * count_parameters(configs[1].model).total)
    with tempfile.TemporaryDirectory(prefix="megallama-resharding-", dir=where) as temporary:
        root, saved = Path(temporary).absolute(), dict[int, list[Part]]()
        for size, config in configs.items():
            parts = run_ranks(save, size, config, root / str(size), timeout=RANK_TIMEOUT)
            saved[size] = [part for mine in parts for part in mine]
        seconds = run_ranks(load, 1, configs[1], root, saved, rounds, timeout=RANK_TIMEOUT)[0]
    report = summary(config_path, configs[1], seconds)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)


if __name__ == "__main__":
    with refusing():
        typer.run(main)
