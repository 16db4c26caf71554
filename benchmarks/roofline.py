"""The least time of a training step on a GPU, counted without one: bytes and FLOPs of its kernels by group.

The training step itself runs, with its engine and optimizer, on tensors that have shapes and no memory; kernels are
counted as they are launched. A group takes the longer of its bytes over a bandwidth and its FLOPs over a rate, both
below the published peaks, as kernels reach them; launches, gaps and the host cost nothing. MFU is of the published
peak, attention counted over the whole square.

Example: python benchmarks/roofline.py configs/1b.yaml --compile
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from counted.compiled_bytes import counting
from counted.fake_gpu import gpu_kernels
from counted.kernel_bytes import KernelBytes, Work
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu, find_gpu
from megallama.hardware.measure import Peak
from megallama.layout.check import check_config
from megallama.layout.counts import flops_per_token, padded_vocabulary
from megallama.layout.topology import Topology
from megallama.parallel.clock import Clock
from megallama.parallel.fake_world import fake_world
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh, build_mesh
from megallama.plan.memory.traffic import Traffic
from megallama.plan.time.communication import Group, collective_seconds

LAYERS, LOSS, EMBEDDING, SUMS, STEP = "norm, rotation, SwiGLU", "loss", "embedding", "gradient sums", "optimizer step"
GROUPS = ("matmul", "attention", LAYERS, LOSS, EMBEDDING, SUMS, STEP, "collectives", "other")
MATMUL, SMALL_MATMUL, ATTENTION, MEMORY = 650 / 989.4, 500 / 989.4, 350 / 989.4, 2.8 / 3.35
"""Shares of the peak that kernels reach: on an H100 650 TFLOP/s, 500 where the model is small, 350 in attention, and
2.8 TB/s. Assumed."""
SMALL = 1024
"""Hidden size below which matmuls are small."""
ACCUMULATIONS = (1, 8)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Count:
    """A step by group, and its collectives."""

    groups: dict[str, Work]
    traffic: Traffic
    ranks: int
    """That share a model, and talk."""
    parameters: int
    """On the rank."""

    def seconds(self, config: RunConfig, gpu: Gpu) -> dict[str, float]:
        """The least that each group takes."""
        peak, bandwidth = gpu.known("peak_tflops") * 1e12, gpu.known("memory_tb_s") * 1e12 * MEMORY
        share = {"matmul": SMALL_MATMUL if config.model.hidden_size < SMALL else MATMUL, "attention": ATTENTION}
        found = {
            name: max(work.bytes / bandwidth, work.flops / (peak * share.get(name, MATMUL)))
            for name, work in self.groups.items()
        }
        if self.traffic.number:
            found["collectives"] = collective_seconds(gpu, Group(self.ranks), self.traffic)
        return {name: found[name] for name in GROUPS if name in found}


def counted_step(config: RunConfig, micro_batches: int) -> Count:
    """A step of so many micro-batches on the first of the ranks that share a model.

    UserError where the run is not legal, or has a pipeline.
    """
    parallel = config.parallel
    if parallel.pipeline > 1:
        raise UserError(
            f"parallel.pipeline={parallel.pipeline}: the ranks of a pipeline wait; give parallel.pipeline=1"
        )
    ranks = parallel.tensor * parallel.context
    batch = micro_batches * config.train.micro_batch_size
    train = config.train.model_copy(update={"global_batch_size": batch, "device": "cpu"})
    config = config.model_copy(update={"train": train})
    check_config(config, ranks)
    launch = Launch(world_size=ranks)
    launch.prepare(CPU)
    counter = KernelBytes(summed=SUMS)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(fake_world(ranks, 0))
        stack.enter_context(without_values())
        stack.enter_context(gpu_kernels())
        stack.enter_context(counting())
        stack.enter_context(spans(counter))
        mesh = build_mesh(Topology(tp=parallel.tensor, cp=parallel.context), launch, CPU)
        stack.enter_context(FakeTensorMode())
        stack.enter_context(counter)
        model, step = engine_step(config, mesh)
        for chunk in model.models:
            as_part([chunk.embed_tokens], EMBEDDING, counter)
            as_part([*chunk.layers.values()], LAYERS, counter)
            as_part([chunk.norm], LAYERS, counter)
            as_part([chunk.lm_head], LOSS, counter)
        step(1)  # compiles, and makes what is made once
        counter.clear()
        step(micro_batches)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Count(counter.groups, Traffic(counter.number, counter.size), ranks, parameters)


def engine_step(config: RunConfig, mesh: ParallelMesh) -> tuple[Any, Callable[[int], object]]:
    """The model, and megallama's own training step of so many micro-batches."""
    from megallama.run_dir.metrics import Metrics
    from megallama.train.run import Run, build_model
    from megallama.train.step import train_step  # brings deepspeed, which looks for a device: after `prepare`

    model, engine = build_model(config, mesh)
    none: Any = None  # a step is given its batches, and saves and heeds nothing
    run = Run(config, mesh, model, engine, none, Metrics([]), none, none, none, none, Peak(1.0, "not used"), None)
    shape = config.train.micro_batch_size, config.data.sequence_length // config.parallel.context
    tokens = torch.zeros(shape, dtype=torch.int64)
    return model, lambda number: train_step(run, [MicroBatch(tokens, tokens)] * number, config.optimizer.lr)


def as_part(modules: Sequence[nn.Module], name: str, counter: KernelBytes) -> None:
    """From here on a call of these, all of one class, is of this part; hooks would be compiled with what they hook."""
    kind: Any = type(modules[0])

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with counter.part(name):
            return kind.__call__(self, *args, **kwargs)

    told = type(kind.__name__, (kind,), {"__call__": call})
    for module in modules:
        module.__class__ = told


@contextmanager
def spans(counter: KernelBytes) -> Iterator[None]:
    """Inside, the spans of training's clock tell which part runs where no module does."""
    span, parts = Clock.span, {"backward": SUMS, "optimizer": STEP}

    @contextmanager
    def told(clock: Clock, name: str, **options: Any) -> Iterator[None]:
        with span(clock, name, **options), counter.part(parts.get(name, "other")):
            yield

    with patch.object(Clock, "span", told):
        yield


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, whoever reads tensors on the host gets ones, and modules stay where they are made."""

    def ones(tensor: Tensor) -> Any:
        return np.ones(tensor.shape, str(tensor.dtype).removeprefix("torch."))

    with (
        patch.object(FakeTensor, "numpy", ones, create=True),
        patch.object(FakeTensor, "tolist", lambda tensor: ones(tensor).tolist(), create=True),
        patch.object(nn.Module, "_apply", lambda module, *_, **__: module),
    ):
        yield


def report(config: RunConfig, gpu: Gpu) -> dict[str, Any]:
    """Groups of a step of one micro-batch, and the times and MFU of steps of some."""
    tokens = config.train.micro_batch_size * config.data.sequence_length
    count = counted_step(config, 1)
    flops = flops_per_token(config.model, config.data.sequence_length, "full") * tokens / count.ranks
    found: dict[str, Any] = {"compile": config.train.compile, "parameters": count.parameters, "groups": {}, "steps": {}}
    for name, taken in count.seconds(config, gpu).items():
        work = count.groups.get(name, Work())
        found["groups"][name] = {"bytes": work.bytes, "flops": work.flops, "seconds": taken, "launches": work.launches}
        found["groups"][name] |= {"kernels": dict(work.kernels.most_common())}
    if "collectives" in found["groups"]:
        size, number = sum(count.traffic.size.values()), sum(count.traffic.number.values())
        found["groups"]["collectives"] |= {"bytes": size, "launches": number, "kernels": dict(count.traffic.number)}
    for micro_batches in ACCUMULATIONS:
        seconds = sum(
            (count if micro_batches == 1 else counted_step(config, micro_batches)).seconds(config, gpu).values()
        )
        mfu = micro_batches * flops / seconds / (gpu.known("peak_tflops") * 1e12)
        found["steps"][micro_batches] = {"seconds": seconds, "mfu": mfu}
    return found | {"units": units(config, found["groups"], count.parameters)}


def units(config: RunConfig, groups: dict[str, Any], parameters: int) -> dict[str, float]:
    """Bytes by what they grow with."""
    tokens = config.train.micro_batch_size * config.data.sequence_length // config.parallel.context
    rows = padded_vocabulary(config.model.vocab_size, config.parallel.tensor) // config.parallel.tensor
    return {
        "GB per layer": groups[LAYERS]["bytes"] / config.model.num_hidden_layers / 1e9,
        "bytes per logit": groups[LOSS]["bytes"] / tokens / rows,
        "bytes per parameter in sums": groups[SUMS]["bytes"] / parameters,
        "bytes per parameter in the step": groups[STEP]["bytes"] / parameters,
    }


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Reports side by side as Markdown."""
    names = ["compiled" if each["compile"] else "eager" for each in reports]
    heads = [f"{name} {what}" for name in names for what in ("TFLOP", "GB", "kernels", "ms")]
    lines = ["| one micro-batch | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for group in GROUPS:
        if any(group in each["groups"] for each in reports):
            cells = [cell for each in reports for cell in _cells(each["groups"].get(group))]
            lines.append(f"| {group} | " + " | ".join(cells) + " |")
    for name, each in zip(names, reports, strict=True):
        lines += ["", f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in each["units"].items())]
        for micro_batches, step in each["steps"].items():
            lines.append(f"{name}, accumulation {micro_batches}: {1e3 * step['seconds']:.0f} ms, MFU {step['mfu']:.1%}")
    return "\n".join(lines)


def _cells(group: dict[str, Any] | None) -> list[str]:
    if group is None:
        return [""] * 4
    flops, size, milliseconds = group["flops"] / 1e12, group["bytes"] / 1e9, 1e3 * group["seconds"]
    return [f"{flops:.1f}" if flops else "", f"{size:.2f}", f"{group['launches']:,}", f"{milliseconds:.1f}"]


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="Config file of a run; its data is not read.")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--gpu", default="h100", help="An accelerator that `megallama plan --gpu` knows.")
    parser.add_argument("--compile", action="store_true", help="Beside it, with train.compile=true.")
    parser.add_argument("--json", action="store_true", help="Print a dictionary for scripts, with every kernel.")
    options = parser.parse_intermixed_args()
    try:
        gpu = find_gpu(options.gpu)
        config = load_config(options.config, [*options.overrides, "train.device=cpu"])
        kinds = [False, True] if options.compile else [config.train.compile]
        trains = [config.train.model_copy(update={"compile": compile_}) for compile_ in kinds]
        reports = [report(config.model_copy(update={"train": train}), gpu) for train in trains]
    except UserError as error:
        print(f"roofline.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(reports, indent=1) if options.json else table(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
