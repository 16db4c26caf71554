"""What a graph that torch.compile makes moves, counted from inductor's plan of its kernels; no code is compiled.

A backend for `torch.compile`: graphs are cut, fused and scheduled for a CPU as inductor does it, and what they return
has no values. Fused for a GPU they can differ in what is fused with a reduction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from counted.kernel_bytes import KernelBytes, collective, flops_of, kind_of
from torch import Tensor, fx
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only


class _CountedError(Exception):
    """Ends a compilation when it is known what the kernels are."""


@contextmanager
def counting() -> Iterator[None]:
    """Inside, whatever is compiled is counted each time it runs, there or later, by the `KernelBytes` around it.

    Each size is compiled for itself.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor import lowering
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        return compile_fx(graph, inputs, inner_compile=_plan)

    compile_ = torch.compile

    def compiled(model: Any = None, **options: Any) -> Any:
        return compile_(model, backend=backend, dynamic=False, fullgraph=options.get("fullgraph", False))

    with (
        patch.object(torch, "compile", compiled),
        inductor.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch.patch(enable_autograd_cache=False),
        patch.dict(lowering.lowerings, {torch.ops.aten.cat.default: _cat}),
    ):
        yield


def _cat(inputs: Any, dim: int = 0) -> Any:
    """Fused with what reads it, as for a GPU, where all of that is elementwise; for a CPU inductor never does."""
    from torch._inductor import config, lowering
    from torch._inductor.utils import is_pointwise_use
    from torch._inductor.virtualized import V

    with config.patch(force_pointwise_cat=all(is_pointwise_use(use) for use in V.current_node.users)):
        return lowering.cat(inputs, dim)


def _plan(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """Instead of inductor's compilation of one graph: a function that counts it, and returns tensors of its shapes."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    kernels: list[tuple[str, str, int]] = []

    def stop(lowered: Any) -> Any:
        lowered._update_scheduler()
        kernels.extend(kernel for node in lowered.scheduler.nodes if (kernel := _kernel(node))[2] > 0)
        raise _CountedError

    with patch.object(GraphLowering, "compile_to_module", stop):
        try:
            compile_fx_inner(graph, inputs, **options)
        except Exception as error:
            if not isinstance(error.__cause__ or error, _CountedError) and not kernels:
                raise
    flops: dict[str, float] = {}
    talked: list[tuple[str, int]] = []
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
        kind = kind_of(node.target)
        if kind is not None:
            flops[kind] = flops.get(kind, 0.0) + flops_of(node.target, args, kwargs, node.meta["val"])
        sent = collective(node.target)
        if sent is not None:
            talked.append((sent, max(args[0].nbytes, node.meta["val"].nbytes)))
    (returned,) = next(node for node in graph.graph.nodes if node.op == "output").args

    def run(arguments: list[Any]) -> list[Any]:
        arguments.clear()
        counter = next(mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, KernelBytes))
        for kind, name, moved in kernels:
            counter.add(kind or counter.here, name, moved)
        for kind, work in flops.items():
            counter.groups[kind].flops += work
        for sent, size in talked:
            counter.talk(sent, size)
        made = [one.meta["val"] if isinstance(one, fx.Node) else one for one in returned]
        return [
            torch.empty_strided(m.shape, m.stride(), dtype=m.dtype, device=m.device) if isinstance(m, Tensor) else m
            for m in made
        ]

    run._boxed_call = True  # type: ignore[attr-defined]  # the arguments are ours to free
    return run


def _kernel(node: Any) -> tuple[str, str, int]:
    """Kind, name and bytes of one of inductor's kernels."""
    op = getattr(node.node, "op_overload", None) if node.node is not None else None
    if op is None:
        return "", "compiled", node.get_read_write_buffers_sizes()
    size = 0 if str(op).startswith("_c10d_functional") else node.get_read_write_buffers_sizes()
    return kind_of(op) or "", str(op), size
