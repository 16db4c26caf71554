"""Time what a step is made of, alone, at the shapes of a config: matmuls and copies, attention, or the loss head.

Example: python benchmarks/gpu_kernels.py attention configs/110m.yaml
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.layout.counts import logits_at_once
from megallama.model.attention import causal_attention, heads_first
from megallama.parallel.cross_entropy import compiled_kernels, linear_cross_entropy
from megallama.parallel.mesh import ALONE, pick_device
from megallama.plan.memory.activations import Tensors, tensors

RIVALS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
Draw = Callable[..., Tensor]


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """The mean of so many, waited for together, after two that are not timed."""
    for _ in range(2):
        work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / times


def ceilings(of: Tensors, config: RunConfig, device: torch.device, draw: Draw) -> list[str]:
    """Rates of the matmuls of a layer and of the head, forward and for both gradients, and of copies of fp32."""
    head = max(1, logits_at_once(of.element) // of.rows)
    matmuls = {
        "qkv": (of.positions, of.hidden, of.qkv),
        "o": (of.positions, of.query, of.hidden),
        "gate and up": (of.positions, of.hidden, of.up),
        "down": (of.positions, of.width, of.hidden),
        "head": (min(of.positions, head), of.hidden, of.rows),
    }
    rates = ", ".join(f"{name} {matmul(*shape, device, draw)}" for name, shape in matmuls.items())
    source = torch.zeros(2**28 if device.type == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source), device)
    return [f"TFLOP/s forward/inputs/weights: {rates}", f"copy {copied / 1e12:.3g} TB/s"]


def matmul(rows: int, inputs: int, outputs: int, device: torch.device, draw: Draw) -> str:
    """TFLOP/s of a product and of the gradients of its inputs and weights."""
    x, weight, gradient = draw(rows, inputs), draw(outputs, inputs), draw(rows, outputs)
    works = (lambda: x @ weight.t(), lambda: gradient @ weight, lambda: gradient.t() @ x)
    return "/".join(f"{2 * rows * inputs * outputs / seconds(work, device) / 1e12:.3g}" for work in works)


def attention(of: Tensors, config: RunConfig, device: torch.device, draw: Draw) -> list[str]:
    """Attention as the model calls it: the kernel that torch takes, its time, and the time of each that it may take."""
    size, batch = config.model.head_size, config.train.micro_batch_size
    projected = draw(of.sequence, batch, of.qkv).requires_grad_()
    widths = [of.query, of.key, of.key]

    def both() -> None:
        q, k, v = (heads_first(part.unflatten(-1, (-1, size))) for part in projected.split(widths, -1))
        out = causal_attention(q, k, v.contiguous())
        out.backward(out.detach())
        projected.grad = None

    flops = 7 * of.positions * of.query * of.sequence  # as megallama.plan.time.kernels counts them
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        both()
    taken = {event.name.removeprefix("aten::_") for event in profiler.events() or [] if "aten::_scaled" in event.name}
    found = [f"takes {min(taken, key=len, default='no fused kernel')}", f"default {rate(flops, seconds(both, device))}"]
    for rival in RIVALS:
        try:
            with sdpa_kernel(rival):
                found.append(f"{rival.name} {rate(flops, seconds(both, device))}")
        except RuntimeError as error:
            found.append(f"{rival.name} does not run ({str(error).splitlines()[0].rstrip('.')[:60]})")
    return found


def rate(flops: float, taken: float) -> str:
    """Milliseconds and TFLOP/s."""
    return f"{1e3 * taken:.3g} ms = {flops / taken / 1e12:.3g} TFLOP/s"


def head(of: Tensors, config: RunConfig, device: torch.device, draw: Draw) -> list[str]:
    """The loss head, forward and backward, beside `F.cross_entropy` of all logits: time, and memory on a GPU."""
    hidden, weight = draw(of.positions, of.hidden).requires_grad_(), draw(of.rows, of.hidden).requires_grad_()
    vocabulary = config.model.vocab_size
    labels = torch.randint(vocabulary, (of.positions,), device=device)
    rivals: dict[str, Callable[[], Tensor]] = {
        "megallama": lambda: linear_cross_entropy(hidden, weight, labels, 0, vocabulary, ALONE),
        "megallama, compiled": lambda: linear_cross_entropy(
            hidden, weight, labels, 0, vocabulary, ALONE, kernels=compiled_kernels()
        ),
        "F.cross_entropy": lambda: F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum"),
    }
    found, losses = [], []
    for name, loss in rivals.items():

        def both(loss: Callable[[], Tensor] = loss) -> None:
            loss().backward()
            hidden.grad = weight.grad = None

        losses.append(float(loss()))
        taken = rate(6 * of.positions * of.hidden * of.rows, seconds(both, device, 5))
        found.append(f"{name} {taken}, {peak_gib(both, device):.2f} GiB")
    return [*found, f"losses differ by {abs(losses[0] / losses[1] - 1):.1e}"]


def peak_gib(work: Callable[[], object], device: torch.device) -> float:
    """The most that it takes on a GPU; 0 on a CPU, whose allocator keeps no count."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


PARTS = {"ceilings": ceilings, "attention": attention, "head": head}


def main() -> None:
    """Measure one part and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("config", metavar="CONFIG", help="Config file of a run; its data is not read.")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    device = pick_device(config.train.device, 0)
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    found = PARTS[options.part](tensors(config), config, device, draw)
    print(f"{options.config.rpartition('/')[2].removesuffix('.yaml')}: {', '.join(found)}")


if __name__ == "__main__":
    main()
