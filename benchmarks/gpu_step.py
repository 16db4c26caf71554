"""Time one contender of `step.py` in this process: seconds, MFU, memory, and kernels by kind.

Weights are drawn on the device, the same for every contender of a config.

Example: python benchmarks/gpu_step.py configs/110m.yaml engine train.global_batch_size=16
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders.steps import Step, bare_step, random_batches, transformers_llama, transformers_loss
from gpu_kernels import synchronize
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.hardware.measure import Peak, device_peak, peak_memory_bytes
from megallama.layout.check import check_config
from megallama.layout.counts import flops_per_token
from megallama.layout.topology import Topology
from megallama.model.llama import Llama
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh, pick_device
from megallama.parallel.shards import ShardSlice
from megallama.plan.memory.activations import tensors
from megallama.plan.time.kernels import KernelWork, head_work, layer_work
from megallama.plan.time.software import known_software

KINDS = {
    "attention": ("flash", "fmha", "attention", "cudnn_generated_fort"),
    "messages": ("nccl", "c10d::", "gloo"),
    "matmul": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitk", "aten::mm", "aten::addmm", "aten::bmm"),
    "norm": ("rms", "layer_norm", "gammabeta"),
    "adam": ("adam",),
    "compiled": ("triton", "cpp_fused", "compiled"),
    "copy": ("memcpy", "memset", "copy", "catarray", "aten::cat"),
    "index": ("index", "gather", "scatter", "embedding"),
    "reduction": ("reduce", "aten::sum", "aten::amax"),
    "elementwise": ("elementwise", "vectorized", "multi_tensor", "aten::mul", "aten::add", "aten::silu", "aten::exp"),
}
"""Words in the name of a kernel, or of an operator on a CPU; the first kind that has one counts."""
TURNS = 3
PROFILED = 2


def build(name: str, config: RunConfig, device: torch.device) -> Step:
    """The step of a contender, as `contenders.steps.build` makes it but for where its weights are drawn."""
    kind, _, suffix = name.partition("-")
    config = config.model_copy(update={"train": config.train.model_copy(update={"compile": suffix == "compile"})})
    if kind == "engine":
        return engine_step(config, device)
    with device:  # what is built here is not moved later; ids are drawn outside, on the CPU
        model = Llama(config.model, recompute=config.train.recompute)
        for parameter, pieces in model.shard_slices.items():
            draw(pieces[0], model.get_parameter(parameter), config)
        reference = transformers_llama(model, config) if kind == "transformers" else None
    if reference is not None:
        return bare_step(reference, transformers_loss(reference), config, device)
    if config.train.compile is True:
        model.compile_parts(layers=True)
    return bare_step(model, model, config, device)


def engine_step(config: RunConfig, device: torch.device) -> Step:
    """megallama's own training step, in a world of one process."""
    from megallama.run_dir.metrics import Metrics
    from megallama.train.run import Run, build_model
    from megallama.train.step import train_step  # brings deepspeed, which looks for a device: after `prepare`

    mesh = build_mesh(Topology(), Launch(), device)
    model, engine = build_model(config, mesh)
    for fragment in engine.fragments():
        draw(model.shard_slices[fragment.parameter][0], fragment.master, config)
    engine.state_was_loaded(0)
    none: Any = None  # a step is given its batches, and saves and heeds nothing
    run = Run(config, mesh, model, engine, none, Metrics([]), none, none, none, none, Peak(1.0, "not used"), None)
    batches = random_batches(config)
    return lambda: train_step(run, next(batches), config.optimizer.lr).loss


@torch.no_grad()
def draw(piece: ShardSlice, out: Tensor, config: RunConfig) -> None:
    """Fill the parameter that begins with `piece` with values of the size of initial weights."""
    if len(piece.shape) == 1:
        out.fill_(1.0)
        return
    draws = torch.Generator(out.device).manual_seed(zlib.crc32(piece.name.encode()))
    residual = piece.name.endswith(("o_proj.weight", "down_proj.weight"))
    layers = config.model.num_hidden_layers
    out.normal_(0.0, config.model.initializer_range / (math.sqrt(2 * layers) if residual else 1), generator=draws)


def measure(step: Step, steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds per step of a few turns, memory, and losses, after a first step that is timed apart."""
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    first_seconds, first = timed(step, 1, device)
    timed(step, 2, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    turns, losses = zip(*(timed(step, steps, device) for _ in range(TURNS)), strict=True)
    return {
        "seconds": median(turns),
        "turns": turns,
        "first_seconds": first_seconds,
        "state_bytes": held,
        "peak_memory_bytes": peak_memory_bytes(device),
        "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else 0,
        "losses": [*first, *(loss for turn in losses for loss in turn)],
    }


def timed(step: Step, steps: int, device: torch.device) -> tuple[float, list[float]]:
    """Seconds per step, the device waited for at both ends only, and the losses."""
    synchronize(device)
    began = time.perf_counter()
    losses = [step() for _ in range(steps)]
    synchronize(device)
    return (time.perf_counter() - began) / steps, [float(loss) for loss in losses]


def profiled(step: Step, device: torch.device) -> dict[str, Any]:
    """Of a step: kernels, their milliseconds by kind, the share of time in which one runs, and the longest by name.

    On a CPU operators stand for kernels.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        seconds, _ = timed(step, PROFILED, device)
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    busy = reached = 0.0
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [e for e in profiler.events() or [] if e.device_type == wanted and not e.is_user_annotation]
    for event in sorted(events, key=lambda event: event.time_range.start):
        span = event.time_range
        taken = (span.elapsed_us() if cuda else event.self_cpu_time_total) / 1e3 / PROFILED
        kinds[kind_of(event.name)] += taken
        names[event.name[:100]] += taken
        busy += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return {
        "kernels": len(events) / PROFILED,
        "busy": busy / 1e6 / PROFILED / seconds,
        "milliseconds": dict(kinds.most_common()),
        "longest": dict(names.most_common(30)),
    }


def kind_of(kernel: str) -> str:
    """The first kind of KINDS whose words are in the name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def counted(config: RunConfig) -> KernelWork:
    """What a step computes and moves, by the planner's count."""
    of, software = tensors(config), known_software()["megallama"]
    layers = layer_work(config, of, software).times(config.model.num_hidden_layers)
    return (layers + head_work(config, of, software)).times(check_config(config, 1).gradient_accumulation_steps)


def report(config: RunConfig, device: torch.device, found: dict[str, Any]) -> dict[str, Any]:
    """`found`, with speeds, and rates of kernels by the planner's count."""
    peak = device_peak(device, torch.bfloat16 if config.train.dtype == "bf16" else torch.float32)
    speed, work = config.tokens_per_step / found["seconds"], counted(config)
    spent = {kind: found["profile"]["milliseconds"].get(kind, math.inf) / 1e3 for kind in ("matmul", "attention")}
    return found | {
        "tokens_per_second": speed,
        "mfu": speed * flops_per_token(config.model, config.data.sequence_length, "full") / peak.flops,
        "peak": [peak.flops, peak.source],
        "matmul_tflops": work.matmul_flops / spent["matmul"] / 1e12,
        "attention_tflops": work.attention_flops / spent["attention"] / 1e12,
        "counted_bytes": work.bytes_moved,
    }


def line(found: dict[str, Any]) -> str:
    """The short of it."""
    gib, kernels = 2**30, found["profile"]
    spent = ", ".join(f"{kind} {value:.1f}" for kind, value in kernels["milliseconds"].items())
    return (
        f"{1e3 * found['seconds']:.1f} ms/step, {found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.1%}, "
        f"peak {found['peak_memory_bytes'] / gib:.2f} GiB (state {found['state_bytes'] / gib:.2f}, reserved "
        f"{found['reserved_bytes'] / gib:.2f}), first step {found['first_seconds']:.1f} s, "
        f"loss {found['losses'][0]:.5f} to {found['losses'][-1]:.5f}; {kernels['kernels']:.0f} kernels, "
        f"busy {kernels['busy']:.0%}, ms: {spent}; matmul {found['matmul_tflops']:.3g} TFLOP/s, "
        f"attention {found['attention_tflops']:.3g}"
    )


def main() -> None:
    """Measure and print one line; all numbers go to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="Config file of a run; its data is not read.")
    parser.add_argument("contender", help="One of those of step.py.")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--steps", type=int, default=4, help=f"Steps in each of {TURNS} turns.")
    parser.add_argument("--json", type=Path, help="Where all numbers go.")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    device = pick_device(config.train.device, 0)
    Launch().prepare(device)
    step = build(options.contender, config, device)
    found = measure(step, options.steps, device)
    found = report(config, device, found | {"profile": profiled(step, device)})
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print(line(found))


if __name__ == "__main__":
    main()
