"""What column-parallel layers send in backward is under way while the matmul runs that does not need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from megallama.layout.topology import Topology
from megallama.model.layers import GradientFilter, column_linear
from megallama.parallel.issued import COLLECTIVES
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks

Part = Literal["both", "inputs", "weights"]


NAMES = {**COLLECTIVES, "_c10d_functional.wait_tensor.default": "wait"}


class Happened(TorchDispatchMode):
    """Collectives as they begin and are waited for, and matmuls, in their order; and which of them no clock counts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events, self.counted = list[str](), False

    def add(self, event: str) -> None:
        self.events.append(event if self.counted or event == "matmul" else f"{event} past the clock")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kind := NAMES.get(str(func))) is not None:
            self.add(kind)
        elif func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.add("matmul")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def timed(self) -> Iterator[None]:
        self.counted = True
        yield
        self.counted = False


def happened(launch: Launch, cut: bool, part: Part) -> list[str]:
    """In the backward of a layer."""
    seen = Happened()
    tp = replace(build_mesh(Topology(tp=launch.world_size), launch, torch.device("cpu")).tp, timed=seen.timed)
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in ((4, 2, 6), (5, 6)))
    asked = GradientFilter()
    result = column_linear(x, weight, tp, cut, asked)
    gradient = torch.ones_like(result)
    with seen:
        if part == "both":
            result.backward(gradient)
        else:
            with asked.only(part):
                result.backward(gradient)
    return seen.events


EXPECTED: dict[tuple[bool, Part], list[str]] = {
    (True, "both"): ["all_gather", "matmul", "reduce_scatter", "wait", "matmul", "wait"],
    (False, "both"): ["matmul", "all_reduce", "matmul", "wait"],
    (True, "inputs"): ["matmul", "reduce_scatter", "wait"],
    (False, "inputs"): ["matmul", "all_reduce", "wait"],
    (True, "weights"): ["all_gather", "wait", "matmul"],
    (False, "weights"): ["matmul"],
}


@pytest.mark.parametrize(("cut", "part"), EXPECTED)
def test_each_collective_is_under_way_beside_a_matmul(cut: bool, part: Part) -> None:
    """And counted as talk over tp: its beginning and the wait for its end."""
    assert run_ranks(happened, 2, cut, part) == [EXPECTED[cut, part]] * 2


def compiled(launch: Launch, cut: bool) -> list[str]:
    """What happens in the backward of a layer that torch's compiler has taken as one graph."""
    tp = build_mesh(Topology(tp=launch.world_size), launch, torch.device("cpu")).tp
    graphs = list[list[str]]()

    def keep(graph: torch.fx.GraphModule, _: object) -> Any:
        named = [NAMES.get(str(node.target), str(node.target)) for node in graph.graph.nodes]
        graphs.append([name.replace("aten.mm.default", "matmul") for name in named])
        return make_boxed_func(graph.forward)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return 2 * column_linear(x, weight, tp, cut, part)

    tensors, part = [torch.randn(*shape, requires_grad=True) for shape in ((4, 2, 6), (5, 6))], GradientFilter()
    plain = layer(*tensors)
    expected = torch.autograd.grad(plain.sum(), tensors)
    found = torch.compile(layer, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)(*tensors)
    torch.testing.assert_close((found, *torch.autograd.grad(found.sum(), tensors)), (plain, *expected))
    _, backward = graphs
    return [name for name in backward if name in ("matmul", *NAMES.values())]


@pytest.mark.parametrize("cut", [True, False])
def test_a_compiled_layer_keeps_them_beside_its_matmuls(cut: bool) -> None:
    assert run_ranks(compiled, 2, cut) == [EXPECTED[cut, "both"]] * 2
