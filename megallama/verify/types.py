"""`megallama verify --types`: each stage of a run at its whole mesh, run forward on tensors without values.

A checker (spmd_types) follows along each axis whether a tensor is replicated, invariant, varying or partial, and
refuses an operation whose gradient would be wrong, as where a `copy_to` is missing. What each collective does to the
types stands beside it; here stands what a whole stage is given and must return.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import spmd_types
import torch
from spmd_types import I, MeshAxis, P, R, SpmdTypeError, V
from spmd_types._mesh_axis import _reset as forget_names
from spmd_types.checker import typecheck
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function

import megallama
from megallama.config.schema import RunConfig
from megallama.layout.check import check_training
from megallama.layout.frozen import frozen_weights
from megallama.layout.stages import Stage, stages
from megallama.layout.topology import AXES, AxisName, Topology
from megallama.model.attention import FusedAttention
from megallama.model.llama import Llama, TensorParallelContext
from megallama.model.stages import ModelStages
from megallama.parallel.fake_world import fake_axis, fake_world
from megallama.parallel.mesh import Axis

Types = dict[AxisName, Any]
"""The type of a tensor along each axis of the mesh."""

WORDS = {R: "replicate", I: "invariant", V: "varying", P: "partial"}
TYPED: tuple[AxisName, ...] = tuple(name for name in AXES if name != "pp")
"""Over pp nothing is computed: stages hand hidden states on, whose types must be the same on both sides."""


@dataclass(frozen=True)
class Fault:
    """A type that does not fit."""

    stage: Stage
    sentence: str
    """The checker's, with the operation and the types it was given."""
    lines: list[str]
    """Of the model, the innermost last: `megallama/model/layers.py:72: return F.linear(...)`."""


@dataclass(frozen=True)
class Checked:
    """What was checked of one stage."""

    stage: Stage
    weights: int
    """Tensors, not their elements."""
    operations: int
    """That were given types."""
    crossings: Mapping[AxisName, Mapping[str, int]]
    """By axis, the functions with a gradient that communicate over it, and their number."""


@dataclass(frozen=True)
class TypeReport:
    """All stages of a run, or those up to the first fault."""

    topology: Topology
    stages: list[Checked]
    fault: Fault | None = None


def check_types(
    config: RunConfig,
    world_size: int,
    *,
    device: str = "meta",
    documents: Tensor | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> TypeReport:
    """Check every stage of a run on `world_size` ranks, in the order of the ranks that hold them, to the first fault.

    On a `device` other than meta parameters and tokens have memory, and `documents` [batch, sequence] may say what the
    documents are; on meta each row is one.

    UserError for a run that is not legal on so many ranks.
    """
    topology = Topology(dp=check_training(config, world_size).dp_size, **config.parallel.sizes)
    every, found = stages(config), list[Checked]()
    with fake_world(world_size, 0), spmd_types.traceback_filtering("off"):
        forget_names()  # of the axes of an earlier mesh in this process
        axes = {name: fake_axis(topology, 0, name) for name in TYPED}
        with spmd_types.set_current_mesh(_mesh(axes)):
            for place in range(topology.pp):
                chunks = _build(config, every, place, axes, torch.device(device))
                for index, model in zip(chunks.indices, chunks.models, strict=True):
                    progress(f"stage {index} of {len(every)}")
                    try:
                        found.append(_check_stage(config, every[index], len(every), model, axes, documents))
                    except SpmdTypeError as error:
                        return TypeReport(topology, found, Fault(every[index], str(error), _own_lines(error)))
    return TypeReport(topology, found)


def _check_stage(
    config: RunConfig,
    stage: Stage,
    count: int,
    model: Llama,
    axes: Mapping[AxisName, Axis],
    documents: Tensor | None,
) -> Checked:
    """Give types to all that one of `count` stages is given, run it, and hold what it returns against them.

    SpmdTypeError where a type does not fit. The mesh must be set.
    """
    train, parallel, typed = config.train, config.parallel, spmd_types.assert_type
    device, dtype = model.frequencies.device, next(model.parameters()).dtype
    for parameter in model.parameters():
        cut, share = (hasattr(parameter, mark) for mark in ("tensor_model_parallel", "has_share_of_gradient"))
        typed(parameter, weight_types(cut=cut, share=share))
    typed(model.frequencies, _types(R))
    batch, length = train.micro_batch_size, config.data.sequence_length
    own = length // parallel.context
    tokens = typed(torch.zeros(batch, own, dtype=torch.int64, device=device), TOKENS)
    if config.data.document_mask:
        documents = torch.zeros(batch, length, dtype=torch.int64, device=device) if documents is None else documents
        typed(documents, DOCUMENTS)
    first, last, between = stage.index == 0, stage.index == count - 1, hidden_types(config)
    shape = own // (parallel.tensor if parallel.sequence_parallel else 1), batch, config.model.hidden_size
    hidden = typed(torch.zeros(shape, dtype=dtype, device=device, requires_grad=True), between)
    values = _WITHOUT_VALUES if device.type == "meta" else nullcontext()
    with values, typecheck(local=True), _Crossings(axes) as crossings:
        output = model(tokens if first else hidden, tokens if last else None, documents)
    _expect(output, LOSS if last else between, "the loss" if last else "the hidden states for the next stage")
    return Checked(stage, len(list(model.parameters())), crossings.operations, crossings.found)


def _types(of_all: Any, **others: Any) -> Types:
    return {name: others.get(name, of_all) for name in TYPED}


TOKENS = _types(V, tp=R)
"""Tokens and labels."""
DOCUMENTS = _types(V, tp=R, cp=R)
"""Keys of the whole sequence ask for them."""
LOSS = _types(V, tp=I)
"""Its sum over the copies and the parts of sequences is what is differentiated: ZeRO sums the gradients."""


def weight_types(*, cut: bool, share: bool) -> Types:
    """Over dp and cp a share of the gradient, which ZeRO sums; over tp only of what the engine sums once per step."""
    return _types(R, tp=V if cut else R if share else I)


def hidden_types(config: RunConfig) -> Types:
    """Of hidden states between layers and between stages."""
    return _types(V, tp=V if config.parallel.sequence_parallel else I)


def _build(
    config: RunConfig, every: list[Stage], place: int, axes: Mapping[AxisName, Axis], device: torch.device
) -> ModelStages:
    """The stages of one place of the pipeline, as the run builds them."""
    with torch.device(device):
        chunks = ModelStages(
            config.model,
            every,
            place,
            TensorParallelContext.of(config, axes),
            recompute=config.train.recompute,
            z_loss=config.optimizer.z_loss,
        )
    chunks.freeze(frozen_weights(config.model, config.train.freeze))
    return chunks.to(device, torch.bfloat16 if config.train.dtype == "bf16" else torch.float32)


def _mesh(axes: Mapping[AxisName, Axis]) -> dict[str, MeshAxis]:
    return {name: MeshAxis.of(1, 1) if axis.group is None else MeshAxis.of(axis.group) for name, axis in axes.items()}


def _expect(x: Tensor, types: Types, words: str) -> None:
    """SpmdTypeError where `x` has other types, or none: assert_type would give them to it."""
    axes = spmd_types.current_mesh_all_names()
    found = {name: spmd_types.maybe_get_axis_local_type(x, axes[name]) for name in TYPED if axes[name].size() > 1}
    wrong = [name for name in found if found[name] is not types[name]]
    if wrong:
        parts = (f"{WORDS.get(found[name], 'untyped')} over {name} and not {WORDS[types[name]]}" for name in wrong)
        raise SpmdTypeError(f"{words}: {', '.join(parts)}")


def _one_document_a_row(attention: FusedAttention, documents: Tensor) -> list[tuple[int, slice]]:
    return _STRETCHES(attention, torch.zeros(documents.shape, device="cpu"))


_STRETCHES = FusedAttention.stretches
_WITHOUT_VALUES = patch.object(FusedAttention, "stretches", _one_document_a_row)
"""Without values nobody can say where documents end."""


@dataclass
class _Crossings(TorchFunctionMode):
    """Counts what passes on to the checker."""

    axes: Mapping[AxisName, Axis]
    operations: int = 0
    found: dict[AxisName, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in TYPED})

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        function = getattr(func, "__self__", None)
        if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
            return func(*args, **(kwargs or {}))
        for axis in args:
            if isinstance(axis, Axis) and axis.size > 1:
                (name,) = (name for name in TYPED if self.axes[name] is axis)
                self.found[name][function.__name__.removeprefix("_")] += 1
        # What is called here is past the checker: it is asked by name.
        return handle_torch_function(func, [x for x in args if isinstance(x, Tensor)], *args)


def _own_lines(error: BaseException) -> list[str]:
    """The lines of the model that led to the error."""
    root = Path(megallama.__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if root in Path(frame.filename).parents]
    places = [(Path(frame.filename).relative_to(root), frame) for frame in frames]
    return [f"megallama/{path}:{frame.lineno}: {frame.line}" for path, frame in places if path.parts[0] == "model"]
