"""Two ways to bring the bf16 gradients of a pipeline into fp32 sums: how far each is from fp32, and what it holds.

- `hand-over`, what training does: hooks add each gradient to its sum as soon as autograd has it, and each stage hands
  over what the weights' part of a split backward wrote past the hooks.
- `hand-over at the end`: the same, but what went past the hooks stays in `grad`, in bf16, until the step.

Every way computes the same micro-batches from the same weights, on the CPU; the reference is the run in fp32.

Example: python benchmarks/accumulation.py configs/debug.yaml parallel.pipeline=2 parallel.schedule=dualpipev
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.errors import UserError, refusing
from megallama.layout.check import check_config
from megallama.layout.topology import Topology
from megallama.model.stages import ModelStages
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh, build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.train.pipeline import Pipeline

Way = Literal["fp32", "hand-over", "hand-over at the end"]
WAYS: tuple[Way, ...] = ("hand-over", "hand-over at the end")


@dataclass(frozen=True)
class Found:
    """Of one rank in one step."""

    sums: dict[str, Tensor]
    """The fp32 gradient of each parameter."""
    bytes_held: int
    """Of `grad` and of the sums beside it, when they are most: before a stage hands over, or at the end."""


def measure(launch: Launch, config: RunConfig, way: Way) -> Found:
    """One step's gradients of this rank."""
    device = torch.device("cpu")
    launch.prepare(device)
    from megallama.train.run import (
        build_model,
        draw_weights,
    )  # brings deepspeed with it, which looks for a device: after `prepare`

    batching = check_config(config, launch.world_size)
    count = batching.gradient_accumulation_steps
    mesh = build_mesh(Topology(dp=batching.dp_size, **config.parallel.sizes), launch, device)
    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine)
    if way == "fp32":
        for parameter in model.parameters():  # the reference differs by its arithmetic, not by its weights
            parameter.data.copy_(parameter.data.bfloat16())
    most = [0]

    def take(parameters: Iterable[nn.Parameter]) -> None:
        most.append(bytes_held(engine, model))
        if way != "hand-over at the end":
            engine._zero.take(parameters)

    assert isinstance(engine._passes, Pipeline)
    batches = micro_batches(config, count, mesh)
    for stage in engine._passes._schedule(count, batches[0].tokens.shape)._stages:
        stage._take = take
    engine.forward_backward(batches, torch.ones(()))
    held = max(*most, bytes_held(engine, model))
    engine._zero.take(model.parameters())
    return Found(sums(engine, model), held)


def micro_batches(config: RunConfig, count: int, mesh: ParallelMesh) -> list[MicroBatch]:
    """Random tokens and the ones after them, other ones on each data-parallel rank."""
    generator = torch.Generator().manual_seed(mesh.data.rank)
    shape = (count, config.train.micro_batch_size, config.data.sequence_length + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=generator)
    return [MicroBatch(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in ids]


def bytes_held(engine: Any, model: ModelStages) -> int:
    """Of everything that holds gradients now."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return sum(tensor.nbytes for tensor in [*grads, *(group.sums for group in engine._zero._groups)])


def sums(engine: Any, model: ModelStages) -> dict[str, Tensor]:
    """The fp32 gradient by parameter."""
    places = engine._zero._sums._places
    found = {name: places[parameter][1].clone() for name, parameter in model.named_parameters()}
    dist.barrier()
    return found


def numbers(found: list[Found], reference: list[Found]) -> dict[str, float]:
    """Mean and worst relative distance of a parameter's gradient from the reference's, and what was held."""
    errors = [
        float((mine.sums[name] - expected).norm() / expected.norm())
        for mine, theirs in zip(found, reference, strict=True)
        for name, expected in theirs.sums.items()
    ]
    parameters = sum(tensor.numel() for rank in found for tensor in rank.sums.values())
    held = sum(rank.bytes_held for rank in found) / parameters
    return {"mean_error": sum(errors) / len(errors), "worst_error": max(errors), "bytes_per_parameter": held}


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file of a run; its data is not read.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare the ways to sum bf16 gradients in fp32, with the schedule of a config.

    Example: python benchmarks/accumulation.py configs/debug.yaml parallel.pipeline=2 train.global_batch_size=64
    """
    bf16 = load_config(config_path, [*(overrides or []), "train.dtype=bf16"])
    fp32 = load_config(config_path, [*(overrides or []), "train.dtype=fp32"])
    if bf16.parallel.pipeline == 1:
        raise UserError("parallel.pipeline=1 has no schedule to compare under; use parallel.pipeline=2")
    ranks = bf16.parallel.pipeline * bf16.parallel.tensor
    count = check_config(bf16, ranks).gradient_accumulation_steps
    reference = run_ranks(measure, ranks, fp32, "fp32")
    report = {way: numbers(run_ranks(measure, ranks, bf16, way), reference) for way in WAYS}
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table(title=f"{bf16.parallel.schedule}, pipeline {bf16.parallel.pipeline}, {count} micro-batches")
    for column in ("way", "mean error", "worst error", "bytes/parameter held"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, found in report.items():
        mean, worst, held = found.values()
        table.add_row(way, f"{mean:.5f}", f"{worst:.5f}", f"{held:.2f}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    with refusing():
        typer.run(main)
