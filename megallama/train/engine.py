"""The optimizer engine: DeepSpeed ZeRO around this rank's stages. The only file that imports deepspeed.

The rest of the package sees `Engine`: forward and backward over micro-batches, one optimizer step, and the optimizer's
state as flat fragments of parameters, from which checkpoints are made.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import deepspeed
import deepspeed.comm.comm as deepspeed_comm
import deepspeed.runtime.compiler as deepspeed_compiler
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__ as compatible_ops
from deepspeed.runtime import bf16_optimizer
from torch import Tensor, nn

from megallama.checkpoint.tensors import MOMENTS
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.model.init import initialise_owned
from megallama.model.stages import ModelStages
from megallama.parallel.clock import Clock, Timed
from megallama.parallel.mesh import ParallelMesh
from megallama.parallel.shards import ShardSlice
from megallama.train.adamw import adamw, parameter_groups
from megallama.train.average import Average
from megallama.train.pipeline import Pipeline
from megallama.train.zero import Share, Zero, ZeroOne, ZeroThree, ZeroTwo

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


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
    average: Tensor | None = None
    """fp32, perhaps on the host; None without `train.average`, and of a frozen parameter."""


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
        deepspeed_comm.cdb = Timed(deepspeed_comm.cdb, mesh.data.timed)
        if self._stage == 3:  # cut one by one, so that a rank never holds more than its part and one weight
            cut, group = deepspeed.zero.Init, mesh.data.group
            cut(_Weights(weights), group, dtype=self._dtype, config_dict_or_path=dict(settings), mpu=_Mpu(mesh))
        else:
            deque(weights, maxlen=0)
        chunks.to(mesh.device)  # what is no parameter
        self._names = {p: name for name, p in chunks.named_parameters() if p.requires_grad}
        self._frozen = {p: name for name, p in chunks.named_parameters() if not p.requires_grad}
        groups = parameter_groups(self._names, config.zero.bucket_elements if self._stage == 1 else None)
        if not groups:  # this rank's part of the model is frozen: DeepSpeed has no optimizer of nothing
            # Part of the model for as long as DeepSpeed asks it for names.
            chunks.filler = nn.Parameter(torch.zeros(1, dtype=self._dtype, device=mesh.device))
            groups = [(False, [chunks.filler])]
        self._optimizer = adamw(groups, config.optimizer)
        # It asks whether this is Muon, whose module compiles its kernels as it is imported: seconds.
        deepspeed_compiler.compile = lambda: lambda kernel: kernel
        # It collects garbage and prints before and after each group, whatever the log level.
        bf16_optimizer.see_memory_usage = lambda *_, **__: None
        self._engine, *_ = deepspeed.initialize(
            model=chunks,
            optimizer=self._optimizer,
            config=settings,
            mpu=_Mpu(mesh),
            dist_init_required=False,
        )
        chunks._parameters.pop("filler", None)
        stages: Mapping[int, Callable[..., Zero]] = {1: ZeroOne, 2: ZeroTwo, 3: ZeroThree}
        self._zero = stages[self._stage](self._engine, self._optimizer, config, mesh, chunks)
        self._partitions = self._zero.partitions
        self._create_state()
        settings_of_average = config.train.average
        self.average = None if settings_of_average.kind == "none" else Average(self._partitions, settings_of_average)
        """Of the masters that this rank owns, if the run has one."""

        self._passes: _Passes = (
            NoPipeline(self._zero, mesh.clock) if mesh.pp.size == 1 else Pipeline(chunks, config, mesh, self._zero.take)
        )

    def forward_backward(self, batches: Sequence[MicroBatch], scale: Tensor) -> Tensor:
        """Run every micro-batch of a step forward and backward; return the sum of their losses times `scale`, detached.

        It is 0 on ranks without the last stage. Gradients add up, and `step` averages them over data-parallel ranks: a
        `scale` of data-parallel size over the labels counted in the global batch makes them those of the token mean.
        At ZeRO 1 those of a call that no step came after are forgotten.
        """
        self._zero.begin(len(batches))
        # Each micro-batch is copied while the one before computes.
        return self._passes.forward_backward((batch.to(self._mesh.device) for batch in batches), scale)

    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """The summed loss, 0 on ranks without the last stage; touches no gradient."""
        return self._passes.evaluate(batches)

    @torch.no_grad()
    def step(self, lr: float, share: Share | None = None) -> None:
        """Reduce, clip, update, unless the gradient is not finite or `share` says so; every rank must call it.

        All of that is decided on the device: the host has waited for nothing when this returns, unless the optimizer is
        on the host.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with self._mesh.clock.span("optimizer"):
            self._zero.step(share or self._sum_squares)

    def _sum_squares(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        total = mine.clone()
        dist.all_reduce(total, group=self._mesh.world.group)
        return total.sqrt(), torch.zeros_like(total, dtype=torch.bool)

    def fragments(self) -> Iterator[Fragment]:
        """All state on this rank. Over the data-parallel ranks they cover every parameter exactly once."""
        for parameter, name in self._names.items():
            found = self._owned(parameter)
            if found is None:
                continue
            start, partition, offset, numel = found
            state = self._optimizer.state[partition]
            here = slice(offset, offset + numel)
            moments = {kind: state[kind][here] for kind in MOMENTS}
            average = None if self.average is None else self.average.of(partition)[here]
            yield Fragment(name, start, partition.detach()[here], moments, average)
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
        """Make the weights follow the masters, after fragments were overwritten with those of `updates` steps.

        An average begins anew with the masters.
        """
        for partition in self._partitions:
            self._optimizer.state[partition]["step"].fill_(updates)
        if self._stage < 3:
            for parameter in self._frozen:
                self._gather(parameter)
        self._zero.follow_masters()
        if self.average is not None:
            self.average.begin(updates)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are their averages, to the bit those of before after it. Every rank must enter it.

        An error ends the run: behind one nothing is put back, which would wait for ranks that are gone.
        """
        assert self.average is not None
        self.average.exchange()
        self._zero.follow_masters()
        yield
        self.average.exchange()
        self._zero.follow_masters()

    def _owned(self, parameter: nn.Parameter) -> tuple[int, nn.Parameter, int, int] | None:
        """(start in the parameter, flat partition, offset in it, elements) of what this rank owns of `parameter`."""
        any_parameter: Any = parameter
        if self._stage < 3:
            mapping = any_parameter._hp_mapping
            if mapping is None:
                return None
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            return low.start, self._partitions[mapping.param_group_index], high.start, high.numel
        zero = self._engine.optimizer
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
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

    def __init__(self, zero: Zero, clock: Clock) -> None:
        self._zero, self._clock = zero, clock

    def forward_backward(self, batches: Iterable[MicroBatch], scale: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=scale.device)
        for batch in batches:
            with self._clock.span("forward"):
                loss = self._zero.forward(batch.tokens, batch.labels, batch.documents) * scale
            with self._clock.span("backward"):
                self._zero.backward(loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        losses = [self._zero.forward(batch.tokens, batch.labels, batch.documents) for batch in batches]
        return torch.stack(losses).double().sum()


class _Mpu:
    """What DeepSpeed asks of the mesh."""

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
