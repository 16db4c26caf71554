"""Kernels are counted as by hand, eager and compiled, and a step's FLOPs are those of the formula."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from megallama.config.load import load_config
from megallama.hardware.gpus import find_gpu
from megallama.layout.counts import count_parameters, flops_per_token

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmark, which find each other as scripts do."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    names = {"compiled": "counted.compiled_bytes", "gpu": "counted.fake_gpu", "kernels": "counted.kernel_bytes"}
    return SimpleNamespace(**{name: import_module(path) for name, path in {**names, "roofline": "roofline"}.items()})


@pytest.fixture
def counter(tools: Any) -> Iterator[Any]:
    with FakeTensorMode(), tools.kernels.KernelBytes() as counter:
        yield counter


def test_a_matmul_reads_two_matrices_and_writes_one(counter: Any) -> None:
    torch.empty(4, 8) @ torch.empty(8, 16)
    work = counter.groups["matmul"]
    assert (work.bytes, work.flops) == (4 * (4 * 8 + 8 * 16 + 4 * 16), 2 * 4 * 8 * 16)


def test_what_is_written_in_place_is_read_and_written(counter: Any) -> None:
    a, b = torch.empty(100), torch.empty(100, dtype=torch.bfloat16)
    a.add_(b)
    assert counter.groups["other"].bytes == 100 * (4 + 4 + 2)


@pytest.mark.parametrize(
    ("run", "moved"),
    [
        (lambda a: a.t().reshape(50, 2)[3:].detach(), 800),  # of a transposed matrix: a copy
        (lambda a: a.view(100).narrow(0, 5, 20).unsqueeze(0).expand(7, 20), 0),
        (lambda a: a.zero_(), 400),
        (lambda a: a.copy_(torch.empty(10, 10, dtype=torch.bfloat16)), 600),
        (lambda a: a + torch.empty(10)[None].expand(10, 10), 840),
        (lambda a: a * a, 800),
        (lambda a: torch.zeros_like(a), 400),
        (lambda a: F.embedding(torch.empty(5, dtype=torch.int64), a), 40 + 2 * 200),
        (lambda a: torch.mm(a, a, out=torch.empty(10, 10)), 800),
        (lambda a: a.sum(), 404),
        (torch.ops._c10d_functional.wait_tensor, 0),
    ],
)
def test_an_operator_moves_what_its_kernel_does(counter: Any, run: Any, moved: int) -> None:
    run(torch.empty(10, 10))
    assert sum(work.bytes for work in counter.groups.values()) == moved


def test_backward_is_of_the_part_that_its_forward_was(counter: Any) -> None:
    weight = torch.empty(100, requires_grad=True)
    for _ in range(2):
        with counter.part("first"):
            y = weight.sin()
        with counter.part("second"):
            z = y.exp()
        with counter.part("not this one"):
            z.backward(torch.empty(100))
    cos_and_product = 2 + 3
    assert counter.groups["first"].bytes == 2 * 400 * (2 + cos_and_product)
    assert counter.groups["second"].bytes == 2 * 400 * (2 + 3)
    assert counter.groups["sums"].bytes == 400 * 3, "the second gradient is added to the first"
    assert counter.groups.keys() == {"first", "second", "sums"}


def test_adamw_moves_28_bytes_of_a_parameter(counter: Any) -> None:
    parameter = torch.nn.Parameter(torch.empty(1000))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.empty(1000)
    optimizer.step()
    counter.clear()
    optimizer.step()
    assert counter.groups["other"].kernels["aten._fused_adamw_.default"] == 28 * 1000 + 4, "and the number of its step"


def test_a_norm_and_attention_are_a_gpus_kernels(tools: Any, counter: Any) -> None:
    rows, width = 32, 64
    x, weight = (torch.empty(*shape, requires_grad=True) for shape in ((rows, width), (width,)))
    with tools.gpu.gpu_kernels():
        F.rms_norm(x, (width,), weight, 1e-5).backward(torch.empty(rows, width))
    whole, vector, row = 4 * rows * width, 4 * width, 4 * rows
    forward, backward = 2 * whole + vector + row, 2 * (2 * whole + vector + row) + whole + vector
    assert counter.groups["other"].bytes == forward + backward
    q, k = (torch.empty(2, heads, 16, 8, requires_grad=True) for heads in (4, 2))
    with tools.gpu.gpu_kernels():
        F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).sum().backward()
    assert counter.groups["attention"].flops == 7 * 2 * (2 * 4 * 16 * 16 * 8) / 2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_chain_is_one_kernel(tools: Any, counter: Any, compiled: bool) -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        return x.sin().cos()

    x = torch.empty(1000, requires_grad=True)
    with tools.compiled.counting():
        run = torch.compile(chain) if compiled else chain
        for _ in range(2):
            counter.clear()
            with counter.part("chain"):
                y = run(x)
            y.backward(torch.empty(1000))
    # Of vectors: sin 2, cos 2; backward sin 2, neg 2, two products 6, and cos 2.
    assert counter.groups["chain"].bytes == 4000 * (2 + 3 if compiled else 16)
    assert counter.groups["chain"].launches == (2 if compiled else 7)
    assert tuple(y.shape) == (1000,)


@pytest.fixture(scope="module")
def debug() -> Any:
    words = ["model.vocab_size=384", "train.dtype=bf16", "train.device=cpu", "train.micro_batch_size=2", "zero.stage=1"]
    return load_config("configs/debug.yaml", words)


def test_a_step_computes_what_the_formula_says(tools: Any, debug: Any) -> None:
    count = tools.roofline.counted_step(debug, 2)
    tokens = 2 * 2 * debug.data.sequence_length
    matmul, model = count.groups["matmul"].flops, debug.model
    assert matmul == 6 * count_parameters(model).matmul * tokens
    attention = flops_per_token(model, debug.data.sequence_length, "causal") * tokens - matmul
    assert count.groups["attention"].flops == attention * 7 / 6, "backward computes the scores again"
    seconds = count.seconds(debug, find_gpu("h100"))
    assert count.groups.keys() == seconds.keys() >= {*tools.roofline.GROUPS} - {"collectives"}
    one = tools.roofline.counted_step(debug, 1)
    for name, work in count.groups.items():
        twice = 2 if name in ("matmul", "attention", "embedding", "loss", tools.roofline.LAYERS) else 1
        assert work.bytes >= twice * one.groups[name].bytes, name
    assert count.groups["optimizer step"].bytes == one.groups["optimizer step"].bytes


@pytest.mark.benchmarks
@pytest.mark.parametrize("words", [[], ["parallel.tensor=2"]])
def test_the_command_prints_eager_and_compiled(words: list[str]) -> None:
    command = [sys.executable, "benchmarks/roofline.py", "configs/debug.yaml", "train.dtype=bf16", *words]
    done = subprocess.run([*command, "--compile", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    eager, compiled = json.loads(done.stdout)
    layers = "norm, rotation, SwiGLU"
    assert compiled["groups"][layers]["bytes"] < 0.6 * eager["groups"][layers]["bytes"]
    assert compiled["groups"]["matmul"]["flops"] == eager["groups"]["matmul"]["flops"]
    assert ("collectives" in eager["groups"]) == bool(words)
    assert all(0 < step["mfu"] < 1 for each in (eager, compiled) for step in each["steps"].values())


@pytest.mark.benchmarks
def test_a_pipeline_is_refused() -> None:
    command = [sys.executable, "benchmarks/roofline.py", "configs/debug.yaml", "parallel.pipeline=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "give parallel.pipeline=1" in done.stderr
