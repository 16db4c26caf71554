"""The optimizer engine: DeepSpeed ZeRO around this rank's stages. The only file that imports deepspeed.

The rest of the package sees `Engine`: forward and backward over micro-batches, one optimizer step, and the optimizer's
state as flat fragments of parameters, from which checkpoints are made.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__ as compatible_ops
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from megallama.checkpoint.tensors import MOMENTS
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.model.init import initialise_owned
from megallama.model.stages import ModelStages
from megallama.parallel.mesh import ParallelMesh
from megallama.parallel.shards import ShardSlice
from megallama.train.pipeline import Pipeline

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    """Norm of the gradient over all parameters, before clipping; inf when not finite."""
    applied: bool
    """False where every rank skipped the update: the gradient was not finite, or the caller's veto said so."""
    vetoed: tuple[bool, ...] = ()
    """What the veto said."""


Veto = Callable[[Tensor], Tensor]
"""Takes the gradient's norm, on the device, and returns booleans there: with one of them true there is no update."""


@dataclass(frozen=True)
class Fragment:
    """What this rank owns of one local parameter: a flat range of its state, by reference."""

    parameter: str
    start: int
    """First element of the flattened local parameter."""
    master: Tensor
    """fp32; of a frozen parameter, which has no master, the weights as they are trained with."""
    moments: Mapping[str, Tensor]
    """AdamW's `exp_avg` and `exp_avg_sq`, fp32; a frozen parameter has none."""


class Engine:
    """ZeRO stage 1 to 3 in bf16 or fp32 around `chunks`, whose `weights` get their memory as they are asked for.

    Master weights, moments and gradient sums are fp32. Gradients are clipped by their norm over the whole model: over
    tensor-parallel shards and pipeline stages, replicated parameters counted once. Parameters that require no gradient
    are in none of this: weights in the type of training are all there is of them.
    """

    def __init__(
        self,
        chunks: ModelStages,
        weights: Iterator[nn.Parameter],
        config: RunConfig,
        mesh: ParallelMesh,
        settings: Mapping[str, Any],
    ) -> None:
        self._stage, self._mesh, self._data = config.zero.stage, mesh, mesh.data
        self._dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
        # On a CPU DeepSpeed would compile a shared-memory op at start: minutes, a compiler, and a lock that outlives
        # a killed build. gloo does without.
        compatible_ops["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        if self._stage == 3:  # cut one by one, so that a rank never holds more than its part and one weight
            cut, group = deepspeed.zero.Init, mesh.data.group
            cut(_Weights(weights), group, dtype=self._dtype, config_dict_or_path=dict(settings), mpu=_Mpu(mesh))
        else:
            deque(weights, maxlen=0)
        chunks.to(mesh.device)  # what is no parameter
        self._names = {p: name for name, p in chunks.named_parameters() if p.requires_grad}
        self._frozen = {p: name for name, p in chunks.named_parameters() if not p.requires_grad}
        groups = _groups(self._names)
        self._fillers = nn.ParameterList(_fillers(groups, mesh.device, self._dtype) if self._stage == 1 else [])
        chunks.add_module("fillers", self._fillers)  # for as long as DeepSpeed asks the model for names
        self._optimizer = _adamw(groups, config)
        self._group_of = {p: index for index, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        with redirect_stdout(StringIO()):  # BF16_Optimizer prints memory statistics whatever the log level
            self._engine, *_ = deepspeed.initialize(
                model=chunks,
                optimizer=self._optimizer,
                config=settings,
                mpu=_Mpu(mesh),
                dist_init_required=False,
            )
        del chunks.fillers
        self._zero: Any = self._engine.optimizer
        self._create_state()
        self._passes: _Passes = (
            NoPipeline(self._engine) if mesh.pp.size == 1 else Pipeline(chunks, config, mesh, self._take_gradients)
        )

    def forward_backward(self, batches: Iterable[MicroBatch], scale: Tensor) -> Tensor:
        """Run every micro-batch forward and backward; return the sum of their losses times `scale`, detached.

        It is 0 on ranks without the last stage. Gradients add up until `step`, which averages them over data-parallel
        ranks: a `scale` of data-parallel size over the labels counted in the global batch makes them those of the token
        mean.
        """
        return self._passes.forward_backward(batches, scale)

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """The summed loss, 0 on ranks without the last stage; touches no gradient."""
        return self._passes.evaluate(batches)

    def step(self, lr: float, veto: Veto | None = None) -> StepResult:
        """Reduce, clip, update, unless `veto` keeps the update back. Every rank of the mesh must call it.

        A gradient that is not finite is not shown to the veto.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for filler in self._fillers:
            filler.grad = torch.zeros_like(filler)
        self._take_gradients(self._fillers)
        with self._vetoed(veto) as said:
            self._engine.step()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self._mesh.device)
        grad_norm, *vetoed = torch.cat([norm.double().view(1), *(each.double() for each in said)]).tolist()
        applied = bool(self._engine.was_step_applied()) and not any(vetoed)
        return StepResult(grad_norm, applied, tuple(map(bool, vetoed)))

    @contextmanager
    def _vetoed(self, veto: Veto | None) -> Iterator[list[Tensor]]:
        """Inside, AdamW does nothing where `veto` says so, found out once there is a norm; what it said.

        `found_inf` is how a gradient scaler tells torch's fused AdamW on the device that a step is to be left out.
        """
        said: list[Tensor] = []
        if veto is None:
            yield said
            return
        optimizer: Any = self._optimizer

        def ask(*_: Any) -> None:
            if not said:  # ZeRO 1 to 3 update group by group
                said.append(veto(torch.as_tensor(self._zero._global_grad_norm, device=self._mesh.device)))
                optimizer.found_inf = said[0].any().float()

        handle = self._optimizer.register_step_pre_hook(ask)
        try:
            yield said
        finally:
            handle.remove()
            optimizer.found_inf = None

    def fragments(self) -> Iterator[Fragment]:
        """All state on this rank. Over the data-parallel ranks they cover every parameter exactly once."""
        for parameter, name in self._names.items():
            found = self._owned(parameter)
            if found is None:
                continue
            start, partition, offset, numel = found
            state = self._optimizer.state[partition]
            here = slice(offset, offset + numel)
            yield Fragment(name, start, partition.detach()[here], {kind: state[kind][here] for kind in MOMENTS})
        for parameter, name in self._frozen.items():
            start, numel = self._part(parameter)
            if numel > 0:
                yield Fragment(name, start, self._frozen_part(parameter)[:numel], {})

    def initialise(self, held: Mapping[str, Sequence[ShardSlice]], threads: int, **values: Any) -> None:
        """Draw the initial weights: of `held`, by parameter, what this rank owns. Every rank must call it.

        `values` are those of `megallama.model.init.initialise_owned`.
        """
        owned = ((fragment.parameter, fragment.start, fragment.master) for fragment in self.fragments())
        initialise_owned(owned, held, dtype=self._dtype, threads=threads, **values)
        self.state_was_loaded(0)

    @torch.no_grad()
    def state_was_loaded(self, updates: int) -> None:
        """Make the weights follow the masters, after fragments were overwritten with those of `updates` steps."""
        for partition in self._partitions:
            self._optimizer.state[partition]["step"].fill_(updates)
        if self._stage < 3:
            for parameter in self._frozen:
                self._gather(parameter)
            self._zero.update_lp_params()
            return
        for index in range(len(self._partitions)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        kept_whole = self._zero.persistent_parameters
        if kept_whole:
            kept_whole[0].all_gather(kept_whole)

    @property
    def _partitions(self) -> list[nn.Parameter]:
        """The flat fp32 masters that this rank owns."""
        for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(self._zero, name):  # by class: BF16_Optimizer, ZeRO 1 and 2, ZeRO 3
                partitions: list[nn.Parameter] = getattr(self._zero, name)
                return partitions
        raise AssertionError(f"unknown ZeRO optimizer {type(self._zero).__name__}")

    def _owned(self, parameter: nn.Parameter) -> tuple[int, nn.Parameter, int, int] | None:
        """(start in the parameter, flat partition, offset in it, elements) of what this rank owns of `parameter`."""
        any_parameter: Any = parameter
        if self._stage < 3:
            mapping = any_parameter._hp_mapping
            if mapping is None:
                return None
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            return low.start, self._partitions[mapping.param_group_index], high.start, high.numel
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start, numel = self._part(parameter)
        return (start, self._partitions[group], offset, numel) if numel > 0 else None

    def _part(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(start, elements) of what this rank has of a parameter that is cut alone, as ZeRO 3 does it.

        The last part is the rest, which may be nothing: ZeRO 3 pads it to the size of the others.
        """
        whole = getattr(parameter, "ds_numel", parameter.numel())
        size = -(-whole // self._data.size)
        return size * self._data.rank, min(size, whole - size * self._data.rank)

    def _frozen_part(self, parameter: nn.Parameter) -> Tensor:
        """That part of a frozen parameter, by reference."""
        if self._stage == 3:
            any_parameter: Any = parameter
            cut: Tensor = any_parameter.ds_tensor
            return cut
        start, numel = self._part(parameter)
        return parameter.detach().view(-1)[start : start + numel]

    def _gather(self, parameter: nn.Parameter) -> None:
        """Take over the other ranks' parts of a frozen parameter, which ZeRO 1 and 2 hold whole on each."""
        if self._data.size == 1:
            return
        mine, flat = self._frozen_part(parameter), parameter.detach().view(-1)
        size = -(-flat.numel() // self._data.size)
        padded, parts = flat.new_zeros(size), flat.new_empty(size * self._data.size)
        padded[: mine.numel()] = mine
        dist.all_gather(list(parts.split(size)), padded, group=self._data.group)
        flat.copy_(parts[: flat.numel()])

    def _take_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add what a split backward left in `grad` to the fp32 sums, as ZeRO's hooks do with the other gradients.

        In fp32 there is nothing to do: `grad` is the sum.
        """
        if not isinstance(self._zero, BF16_Optimizer):
            return
        for parameter in parameters:
            if parameter.grad is not None:
                any_parameter: Any = parameter
                group, index = self._group_of[parameter], any_parameter._index_in_param_group
                self._zero.accumulate_hp_grads_and_remove_lp(parameter, group, index)

    def _create_state(self) -> None:
        """AdamW's state, made now instead of in the first step, so that a checkpoint has somewhere to go."""
        for partition in self._partitions:
            state = self._optimizer.state[partition]
            on_device = self._optimizer.defaults["fused"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device if on_device else "cpu")
            state |= {kind: torch.zeros_like(partition, requires_grad=False) for kind in MOMENTS}


class _Weights(nn.Module):
    """Weights as a module, which is what DeepSpeed takes them from."""

    def __init__(self, weights: Iterator[nn.Parameter]) -> None:
        super().__init__()
        self._weights = weights

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self._weights


class _Passes(Protocol):
    """Forward and backward of all micro-batches of a step, and evaluation."""

    def forward_backward(self, batches: Iterable[MicroBatch], scale: Tensor) -> Tensor: ...
    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor: ...


class NoPipeline:
    """One micro-batch after the other through a rank that holds the whole model."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def forward_backward(self, batches: Iterable[MicroBatch], scale: Tensor) -> Tensor:
        self._engine.train()
        total = torch.zeros((), dtype=torch.float32, device=scale.device)
        for batch in batches:
            loss = self._engine(batch.tokens, batch.labels, batch.documents) * scale
            self._engine.backward(loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        self._engine.eval()
        losses = [self._engine(batch.tokens, batch.labels, batch.documents) for batch in batches]
        return torch.stack(losses).double().sum()


class _Mpu:
    """What DeepSpeed asks of the mesh.

    The norm is summed over `get_model_parallel_group`, which must span all of one model copy; a parameter that is not
    marked `tensor_model_parallel` counts on tensor-parallel rank 0 only.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> Any:
        return self._mesh.data.group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.data.size

    def get_model_parallel_group(self) -> Any:
        return self._mesh.model.group

    def get_model_parallel_rank(self) -> int:
        return self._mesh.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.model.size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tp.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tp.size


def _groups(trained: Iterable[nn.Parameter]) -> dict[bool, list[nn.Parameter]]:
    """Matrices, which are decayed, and norm weights, which are not; ZeRO 3 says of what it has cut how it was."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in trained:
        groups[len(getattr(parameter, "ds_shape", parameter.shape)) >= 2].append(parameter)
    return groups


def _fillers(groups: Mapping[bool, list[nn.Parameter]], device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
    """A zero to train in each group that is empty, since what this rank has of it is frozen.

    DeepSpeed reduces the norm group by group, and pipeline ranks must have as many; with none it ends in an error.
    """
    fillers = []
    for group in groups.values():
        if not group:
            filler = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
            filler.tensor_model_parallel = True  # type: ignore[attr-defined]  # else the norm is of nothing on some
            group.append(filler)
            fillers.append(filler)
    return fillers


def _adamw(groups: Mapping[bool, list[nn.Parameter]], config: RunConfig) -> torch.optim.AdamW:
    decays = {True: config.optimizer.weight_decay, False: 0.0}
    given = [{"params": group, "weight_decay": decays[matrices]} for matrices, group in groups.items() if group]
    lr, betas, eps = config.optimizer.lr, config.optimizer.betas, config.optimizer.eps
    return torch.optim.AdamW(given, lr=lr, betas=betas, eps=eps, fused=True)
