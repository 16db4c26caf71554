"""Save and load one checkpoint of a config: megallama's, three of torch's, and DeepSpeed's own.

Random weights and moments, no dataset. The contenders take turns in the same processes, each alone on the disk: it
saves into an empty folder, what it left unwritten is flushed, the state in memory is set to zero, it loads, and the
state must be what was saved, to the bit. Then its files are removed.

Training may go on after the "stall". megallama and torch's asynchronous Distributed Checkpoint have copied the state by
then, and processes of theirs write it; the others have saved. "save" is the time until that is done.

Not all is on the disk by then. megallama and the Distributed Checkpoints sync every file. torch.save syncs nothing, so
the benchmark syncs its file, inside its time. DeepSpeed syncs nothing and is left as it is: what it still owes the disk
is timed apart, as "unwritten". Loads come from the page cache for all.

Example: python benchmarks/checkpoint.py configs/110m.yaml train.device=cpu --ranks 2 --rounds 3
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.distributed as dist
import typer
from contenders.checkpoints import Contender, chunks, contenders, state_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megallama.checkpoint.tensors import is_weight
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError, refusing
from megallama.layout.check import check_config
from megallama.layout.counts import count_parameters
from megallama.layout.topology import Topology
from megallama.model.stages import ModelStages
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh, build_mesh, pick_device
from megallama.parallel.spawn import run_ranks

if TYPE_CHECKING:
    from megallama.train.engine import Engine

BYTES_PER_PARAMETER = 12.1
"""Most that a checkpoint of fp32 weights and two moments may take, where the model is not small."""
NOT_SMALL = 100_000_000
"""Parameters from which the above holds: below, names and places of many small tensors weigh more."""
DISK_BYTES_PER_PARAMETER = 20
"""Free disk asked for. There is one checkpoint at a time; DeepSpeed's is the largest, 16 in fp32."""
RANK_TIMEOUT = 3600.0
"""Seconds after which silent ranks are given up."""


@dataclass(frozen=True)
class Turn:
    """What one save and one load took."""

    stall_seconds: float
    """Until the save let training go on."""
    save_seconds: float
    """Until it had ended."""
    unwritten_seconds: float
    """To bring to the disk what the save had left in the page cache."""
    load_seconds: float
    bytes: int
    """Of all files."""


def measure(
    launch: Launch, config: RunConfig, device: torch.device, folder: Path, rounds: int
) -> dict[str, list[Turn]]:
    """The turns of every contender, as one rank of the job sees them."""
    engine, model, mesh = build(launch, config, device)
    found = contenders(engine, model, mesh, folder)
    turns: dict[str, list[Turn]] = {name: [] for name in found}
    for number in range(rounds):
        # Back and forth: a disk that slows down steadily favours no one.
        for name in list(found) if number % 2 == 0 else list(reversed(found)):
            turns[name].append(take_turn(found[name], name, engine, model, mesh, folder / name))
    dist.destroy_process_group()
    return turns


def build(launch: Launch, config: RunConfig, device: torch.device) -> tuple[Engine, ModelStages, ParallelMesh]:
    """This rank's part of a run that has a state to save."""
    launch.prepare(device)
    from megallama.train.run import (
        build_model,
        draw_weights,
    )  # brings deepspeed with it, which looks for a device: after `prepare`

    batching, parallel = check_config(config, launch.world_size), config.parallel
    mesh = build_mesh(Topology(dp=batching.dp_size, **parallel.sizes), launch, device)
    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine)
    fill_moments(engine, model)
    return engine, model, mesh


def take_turn(
    contender: Contender, name: str, engine: Engine, model: ModelStages, mesh: ParallelMesh, folder: Path
) -> Turn:
    """Save, flush, forget, load and compare, in a folder that is gone afterwards."""
    if mesh.rank == 0:
        folder.mkdir()
    expected = checksums(engine, model)
    contender.prepare()
    stall_seconds = timed(lambda: contender.save(folder), mesh)
    save_seconds = stall_seconds + timed(contender.wait, mesh)
    unwritten_seconds = timed(lambda: flush(folder) if mesh.rank == 0 else None, mesh)
    size = sum(path.stat().st_size for path in files(folder))
    forget(engine)
    load_seconds = timed(lambda: contender.load(folder), mesh)
    if checksums(engine, model) != expected:
        raise RuntimeError(f"{name} loaded something else than it had saved")
    dist.barrier(mesh.world.group)
    if mesh.rank == 0:
        shutil.rmtree(folder)
    return Turn(stall_seconds, save_seconds, unwritten_seconds, load_seconds, size)


def timed(function: Callable[[], object], mesh: ParallelMesh) -> float:
    """Seconds from when all ranks begin to when all are done."""
    meet(mesh)
    began = time.perf_counter()
    function()
    meet(mesh)
    return time.perf_counter() - began


def meet(mesh: ParallelMesh) -> None:
    """Wait until every rank and its device are here."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(mesh.world.group)


def fill_moments(engine: Engine, model: ModelStages) -> None:
    """Give the moments values that no file system can compress, the same wherever a rank holds the same chunk."""
    for place, chunk in chunks(engine, model):
        if not is_weight(place):
            torch.manual_seed(zlib.crc32(place.encode()))
            chunk.uniform_()


def forget(engine: Engine) -> None:
    """Set all state to zero."""
    for fragment in engine.fragments():
        for tensor in state_of(fragment).values():
            tensor.zero_()


def checksums(engine: Engine, model: ModelStages) -> dict[str, int]:
    """Of every chunk of this rank's state."""
    return {place: checksum(chunk) for place, chunk in chunks(engine, model)}


def checksum(chunk: Tensor) -> int:
    """Of the bits, in their order."""
    return zlib.crc32(chunk.contiguous().cpu().view(torch.uint8).numpy().data)


def flush(folder: Path) -> None:
    """Wait until all files under `folder` are on the disk."""
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def files(folder: Path) -> Iterator[Path]:
    """All that are under `folder`."""
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def summary(
    config_path: Path, config: RunConfig, device: torch.device, ranks: int, turns: dict[str, list[Turn]]
) -> dict[str, Any]:
    """All numbers of the report; ratios are of each contender to torch.save, round by round."""
    parameters = count_parameters(config.model).total
    return {
        "config": str(config_path),
        "parameters": parameters,
        "dtype": config.train.dtype,
        "ranks": ranks,
        "tensor": config.parallel.tensor,
        "pipeline": config.parallel.pipeline,
        "zero_stage": config.zero.stage,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "rounds": len(turns["megallama"]),
        "contenders": {name: numbers(mine, turns["torch.save"], parameters) for name, mine in turns.items()},
        "limit_bytes_per_parameter": BYTES_PER_PARAMETER if parameters >= NOT_SMALL else None,
    }


def numbers(mine: Sequence[Turn], reference: Sequence[Turn], parameters: int) -> dict[str, Any]:
    """Of one contender: medians over the rounds."""
    size = max(turn.bytes for turn in mine)
    pairs = list(zip(mine, reference, strict=True))
    return {
        "bytes": size,
        "bytes_per_parameter": size / parameters,
        "stall_seconds": median(turn.stall_seconds for turn in mine),
        "save_seconds": median(turn.save_seconds for turn in mine),
        "unwritten_seconds": median(turn.unwritten_seconds for turn in mine),
        "load_seconds": median(turn.load_seconds for turn in mine),
        "save_ratio": median(a.save_seconds / b.save_seconds for a, b in pairs),
        "load_ratio": median(a.load_seconds / b.load_seconds for a, b in pairs),
        "stall_rounds": [turn.stall_seconds for turn in mine],
        "save_rounds": [turn.save_seconds for turn in mine],
        "load_rounds": [turn.load_seconds for turn in mine],
    }


def print_report(report: dict[str, Any]) -> None:
    """The table, and under it what the numbers rest on."""
    # Off a terminal rich takes 80 columns, too few for the table.
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table(
        title=f"{report['config']}: {report['parameters']:,} parameters, {report['dtype']}, ranks: {report['ranks']}, "
        f"tensor {report['tensor']}, pipeline {report['pipeline']}, ZeRO {report['zero_stage']}"
    )
    seconds = ("stall", "save", "unwritten", "load")
    for column in (
        "contender",
        "MiB",
        "bytes/parameter",
        *(f"{what} s" for what in seconds),
        "save ratio",
        "load ratio",
    ):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, found in report["contenders"].items():
        table.add_row(
            name,
            f"{found['bytes'] / 2**20:,.1f}",
            f"{found['bytes_per_parameter']:.3f}",
            *(f"{found[key]:.2f}" for key in (f"{what}_seconds" for what in seconds)),
            *(f"{found[key]:.2f}" for key in ("save_ratio", "load_ratio")),
        )
    console.print(table)
    lines = [
        "ratios are to torch.save, whose file is synced; stall: until training may go on",
        "unwritten: what a sync takes after the save has ended",
        "loads come from the page cache; what was loaded is what was saved, to the bit",
        f"{report['device']}, torch {report['torch']}; medians of {report['rounds']} rounds",
    ]
    for line in lines:
        console.print(line, highlight=False)


def check_disk(folder: Path, parameters: int) -> None:
    """UserError where no checkpoint would fit into `folder`."""
    if not folder.is_dir():
        raise UserError(f"--folder={folder} is not a folder; name one that exists")
    needed, free = DISK_BYTES_PER_PARAMETER * parameters, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--folder={folder} has {free / 1e9:.1f} GB of free disk, and {parameters:,} parameters need "
            f"{needed / 1e9:.1f} GB at {DISK_BYTES_PER_PARAMETER} bytes each; name a folder on a larger disk"
        )


def run(config: RunConfig, device: torch.device, ranks: int, folder: Path, rounds: int) -> dict[str, list[Turn]]:
    """The turns as rank 0 sees them: ranks of their own on the CPU, this process on a GPU."""
    if device.type == "cpu":
        return run_ranks(measure, ranks, config, device, folder, rounds, timeout=RANK_TIMEOUT)[0]
    with redirect_stdout(sys.stderr):  # what libraries print must not mix with the report
        return measure(Launch(), config, device, folder, rounds)


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file of a run; its data is not read.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    ranks: Annotated[int, typer.Option(help="Processes on this machine; more than one only on the CPU.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of each contender.", min=1)] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where to write. Default: the system's temporary folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time saving and loading a checkpoint: megallama, `torch.save` and torch's Distributed Checkpoint, and DeepSpeed.

    Exit code 1 if megallama's takes more than 12.1 bytes per parameter, for 100M parameters or more.
    Example: python benchmarks/checkpoint.py configs/110m.yaml train.micro_batch_size=1 --rounds 3
    """
    config = load_config(config_path, overrides or [])
    check_config(config, ranks)
    device = pick_device(config.train.device, 0)
    if ranks > 1 and device.type == "cuda":
        raise UserError(f"--ranks={ranks} is for the CPU; add train.device=cpu, or use --ranks=1")
    where = folder or Path(tempfile.gettempdir())
    check_disk(where, count_parameters(config.model).total)
    with tempfile.TemporaryDirectory(prefix="megallama-checkpoint-", dir=where) as temporary:
        turns = run(config, device, ranks, Path(temporary).absolute(), rounds)
    report = summary(config_path, config, device, ranks, turns)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    limit = report["limit_bytes_per_parameter"]
    too_large = limit is not None and report["contenders"]["megallama"]["bytes_per_parameter"] > limit
    raise typer.Exit(1 if too_large else 0)


if __name__ == "__main__":
    with refusing():
        typer.run(main)
