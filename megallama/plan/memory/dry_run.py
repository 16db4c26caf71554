"""A rank's real stages, run forward and backward at the full layout without memory or peers, against the ledger.

Tensors are fake: they have shapes, types and owners of memory, and no content. The process group is fake as well: it
has any size, and each collective answers at once. `megallama plan` imports this for `--check` alone, since it needs
torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megallama.config.schema import RunConfig
from megallama.layout.check import check_config, check_trained
from megallama.layout.stages import Stage, stages
from megallama.layout.topology import AXES, AxisName, Topology
from megallama.model import attention
from megallama.model.llama import Llama, TensorParallelContext
from megallama.model.offload import OffloadedInputs
from megallama.model.stages import ModelStages
from megallama.parallel.fake_world import fake_axis, fake_world
from megallama.parallel.issued import Issued
from megallama.parallel.mesh import Axis
from megallama.plan.memory.activations import stage_bytes, tensors
from megallama.plan.memory.state import rank_parameters
from megallama.plan.memory.traffic import context_traffic, stage_traffic


class KeptForBackward:
    """Bytes that autograd keeps beside the parameters; operations that keep views of one tensor share its memory."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self._known = {parameter.untyped_storage()._cdata for parameter in parameters}
        # By address, and held: an address that is free is given out again.
        self._kept: dict[int, torch.UntypedStorage] = {}

    @property
    def size(self) -> int:
        """The bytes so far."""
        return sum(storage.nbytes() for place, storage in self._kept.items() if place not in self._known)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, what operations save is counted, but for what goes to the host, whose hooks come before these."""
        pack = OffloadedInputs._pack

        def packed(inputs: OffloadedInputs, tensor: Tensor) -> Any:
            found = pack(inputs, tensor)
            return self._keep(found) if isinstance(found, Tensor) else found

        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        with hooks, patch.object(OffloadedInputs, "_pack", packed):
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = storage
        return tensor


@dataclass(frozen=True)
class Comparison:
    """One figure of the ledger beside the one that was counted."""

    name: str
    planned: int
    counted: int

    @property
    def equal(self) -> bool:
        """To the last unit."""
        return self.planned == self.counted


def check_rank(config: RunConfig, world_size: int, rank: int) -> list[Comparison]:
    """Everything that can be counted on `rank` of `world_size`.

    Parameters, bytes kept for backward, collectives of the layers, messages between stages.

    UserError if the run is not legal on that many ranks.
    """
    check_trained(config.model)
    parallel = config.parallel
    topology = Topology(dp=check_config(config, world_size).dp_size, **parallel.sizes)
    # Tokens without content are of one document: what documents add is neither planned nor counted here.
    data = config.data.model_copy(update={"document_mask": False, "pad": "right"})
    train = config.train.model_copy(update={"compile": False})  # a compiled layer may keep less
    config = config.model_copy(update={"data": data, "train": train})
    place = topology.coordinate(rank, "pp")
    every = stages(config)
    mine = [stage for stage in every if stage.rank == place]
    planned = rank_parameters(config)[place].total
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    with fake_world(world_size, rank), FakeTensorMode(), torch.device("cpu"), _kernels_of(config), _default(dtype):
        axes: dict[AxisName, Axis] = {name: fake_axis(topology, rank, name) for name in AXES if name != "dp"}
        tp_context = TensorParallelContext.of(config, axes)
        chunks = ModelStages(config.model, every, place, tp_context, recompute=config.train.recompute)
        weights = list(chunks.parameters())
        found = [
            Comparison("parameters", planned, sum(weight.numel() for weight in weights)),
            Comparison("bytes of weights", planned * dtype.itemsize, sum(weight.nbytes for weight in weights)),
        ]
        for stage, model in zip(mine, chunks.models, strict=True):
            found += _run_stage(config, stage, len(every), model)
    return found


def _run_stage(config: RunConfig, stage: Stage, count: int, model: Llama) -> list[Comparison]:
    """One micro-batch through one stage, there and back."""
    batch, length = config.train.micro_batch_size, config.data.sequence_length // config.parallel.context
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    cut = config.parallel.tensor if config.parallel.sequence_parallel else 1
    hidden = torch.zeros(length // cut, batch, config.model.hidden_size, requires_grad=True)
    last = stage.index == count - 1
    with Issued() as issued:
        kept = KeptForBackward(model.parameters())
        with kept.counting():
            output = model(tokens if stage.index == 0 else hidden, tokens if last else None)
        output.backward(torch.ones_like(output))
    words = f"stage {stage.index}:"
    planned = stage_bytes(config, tensors(config), stage, count).saved
    traffic = stage_traffic(config, stage, count) + context_traffic(config, len(stage.layers))
    found = [Comparison(f"{words} bytes kept for backward", planned, kept.size)]
    state = tensors(config).state
    if not last:
        found.append(Comparison(f"{words} message to the next stage, bytes", state, output.nbytes))
    if stage.index > 0:
        assert hidden.grad is not None
        found.append(Comparison(f"{words} message to the stage before, bytes", state, hidden.grad.nbytes))
    for kind in sorted({*traffic.number, *issued.number}):
        found.append(Comparison(f"{words} {kind}", traffic.number[kind], issued.number[kind]))
        found.append(Comparison(f"{words} {kind}, bytes", traffic.size[kind], issued.size[kind]))
    return found


class GpuKernel(torch.autograd.Function):
    """What a GPU's kernel keeps for its backward, without its arithmetic: what it reads, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, keeps_output: bool, *read: Tensor) -> Tensor:
        output = torch.zeros_like(read[0])
        row = read[0].new_empty(read[0].shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(*read, row, *([output] if keeps_output else []))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        read = ctx.saved_tensors[: len(ctx.needs_input_grad) - 1]
        return (None, *(torch.zeros_like(each) for each in read))


def fused_norm(x: Tensor, shape: object, weight: Tensor, eps: float) -> Tensor:
    """torch's `_fused_rms_norm`, in place of `torch.nn.functional.rms_norm`."""
    result: Tensor = GpuKernel.apply(False, x, weight)  # type: ignore[no-untyped-call]
    return result


def fused_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """In place of `torch.nn.functional.scaled_dot_product_attention`; a CPU's keeps a mask of each slice as well."""
    result: Tensor = GpuKernel.apply(True, q, k, v)  # type: ignore[no-untyped-call]
    return result


@contextmanager
def _kernels_of(config: RunConfig) -> Iterator[None]:
    """Those of the device that is planned for."""
    with ExitStack() as stack:
        if config.train.device != "cpu":
            kernels = patch.multiple(F, rms_norm=fused_norm, scaled_dot_product_attention=fused_attention)
            stack.enter_context(kernels)
            stack.enter_context(patch.object(attention, "blockwise_attention", fused_attention))
        yield


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
