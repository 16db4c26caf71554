"""What the engine asks of ZeRO after the last backward, stage by stage, of the optimizers that DeepSpeed has built.

DeepSpeed cuts weights, masters and state, and at stages 2 and 3 gradients. Its own step reads the norm of the gradient
on the host, clips in a pass of its own and copies; here each stage says what it has of the squared norm, hears on the
device what to divide by and whether to do anything, and updates (arXiv 1910.02054).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megallama.config.schema import RunConfig
from megallama.model.stages import ModelStages
from megallama.parallel.mesh import ParallelMesh
from megallama.train.adamw import decided, square
from megallama.train.gradient_sums import FlatGroup, GradientSums
from megallama.train.shares import has_share, sum_shares

Share: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Takes a rank's part of the squared norm of the gradient, fp64 on the device, and returns the norm over all ranks of
the mesh and, true, that nothing is to be updated; the same bits on each of them."""


class Zero(ABC):
    """One stage around an optimizer of DeepSpeed."""

    partitions: list[nn.Parameter]
    """The flat fp32 masters that this rank owns."""

    def __init__(
        self, engine: Any, optimizer: torch.optim.AdamW, config: RunConfig, mesh: ParallelMesh, chunks: ModelStages
    ) -> None:
        """`engine` is DeepSpeed's around `chunks`, over `optimizer`."""
        self._engine, self._zero = engine, engine.optimizer
        self._optimizer, self._mesh, self._clip = optimizer, mesh, config.optimizer.clip

    @abstractmethod
    def begin(self, micro_batches: int) -> None:
        """A step of so many micro-batches begins."""

    @abstractmethod
    def forward(self, tokens: Tensor, labels: Tensor | None, documents: Tensor | None) -> Tensor:
        """The loss of a micro-batch, where a rank holds the whole model."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add its gradients to those of the step."""

    @abstractmethod
    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the gradients that were written into `grad` past autograd's hooks."""

    @abstractmethod
    def step(self, share: Share) -> None:
        """Reduce what is not yet reduced, and update masters and weights, which is decided on the device."""

    @abstractmethod
    def follow_masters(self) -> None:
        """Make the weights that are trained those of the masters."""

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether the norm counts it here: shards do everywhere, copies on the first tensor-parallel rank."""
        return self._mesh.tp.rank == 0 or getattr(parameter, "tensor_model_parallel", False)

    def _decided(self, gradients: Iterable[Tensor], share: Share, copies: int = 1) -> AbstractContextManager[None]:
        """What AdamW is to do with gradients of which these count here, the sums over so many copies of the model."""
        counted = list(gradients)
        mine = square(counted) if counted else torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        norm, skip = share(mine / copies**2)
        divisor = ((norm + 1e-6) / self._clip).clamp(min=1)
        where = self.partitions[0].device  # that of AdamW, which may be the host: then it waits here
        return decided(self._optimizer, (divisor * copies).to(where), (skip | ~torch.isfinite(norm)).to(where))


class ZeroOne(Zero):
    """Stage 1: every rank sums all gradients, and receives of the others those of its part of the state.

    In fp32 masters are this rank's part of the weights themselves, unless the optimizer is on the host: masters are
    there then, in DeepSpeed's tensors, and gradients are copied to them for the update (arXiv 2101.06840).
    """

    def __init__(
        self, engine: Any, optimizer: torch.optim.AdamW, config: RunConfig, mesh: ParallelMesh, chunks: ModelStages
    ) -> None:
        super().__init__(engine, optimizer, config, mesh, chunks)
        zero, self._chunks = engine.optimizer, chunks
        self._offloads = config.zero.offload_optimizer == "cpu"
        if self._offloads:
            _leave_gradients(zero)
        if config.train.dtype == "bf16" and not self._offloads:  # BF16_Optimizer, which has sums of its own
            self.partitions = zero.fp32_groups_flat_partition
            parameters, weights, sums = zero.bf16_groups, zero.bf16_groups_flat, zero.fp32_groups_gradients_flat
        else:  # DeepSpeedZeroOptimizer
            self.partitions = zero.single_partition_of_fp32_groups
            parameters, weights = zero.bit16_groups, zero.bit16_groups_flat
            sums = [torch.zeros_like(flat, dtype=torch.float32) for flat in weights]
        self._groups = [FlatGroup(*of) for of in zip(parameters, weights, sums, self.partitions, strict=True)]
        for group in self._groups if not self._offloads else ():
            if group.weights.dtype == group.master.dtype:
                group.master.data = group.part(group.weights, mesh.data)
            group.master.grad = group.part(group.sums, mesh.data)
        zero._link_all_hp_params()  # else the masters of before stay where they are
        self._counted = [part for group in self._groups for part in self._parts(group, self._counts)]
        self._shares = [part for group in self._groups for part in self._parts(group, has_share)]
        found = Counter(parameter for model in chunks.models for parameter in model.parameters())
        passes = {parameter: found[parameter] for group in parameters for parameter in group}
        sent = torch.bfloat16 if config.zero.communication_dtype == "bf16" else torch.float32
        self._sums = GradientSums(self._groups, passes, mesh.data, sent)

    def begin(self, micro_batches: int) -> None:
        self._sums.begin(micro_batches)

    def forward(self, tokens: Tensor, labels: Tensor | None, documents: Tensor | None) -> Tensor:
        # DeepSpeed's own forward and backward are for gradients that it handles, and cost time in Python.
        return self._chunks.forward(tokens, labels, documents)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        self._sums.take(parameters)

    def step(self, share: Share) -> None:
        self._sums.finish()
        sum_shares(self._shares, self._mesh.tp)
        with self._decided(self._counted, share, copies=self._mesh.data.size):
            for group in self._groups if self._offloads else ():
                assert group.master.grad is not None
                group.master.grad.copy_(group.part(group.sums, self._mesh.data))
            self._optimizer.step()
        self.follow_masters()

    @torch.no_grad()
    def follow_masters(self) -> None:
        data = self._mesh.data
        for group in self._groups:
            mine = group.part(group.weights, data)
            if self._offloads or mine.dtype != group.master.dtype:
                mine.copy_(group.master)
            if data.size > 1:
                with data.timed():
                    dist.all_gather_into_tensor(group.weights, mine, group=data.group)

    def _parts(self, group: FlatGroup, chosen: Callable[[nn.Parameter], bool]) -> Iterator[Tensor]:
        """Of this rank's gradients those of `chosen` parameters, as few pieces as can be."""
        if all(map(chosen, group.parameters)):
            yield group.part(group.sums, self._mesh.data)
            return
        size = group.master.numel()
        first = size * self._mesh.data.rank
        ends = accumulate(parameter.numel() for parameter in group.parameters)
        for parameter, end in zip(group.parameters, ends, strict=True):
            begin, end = max(end - parameter.numel(), first), min(end, first + size)
            if begin < end and chosen(parameter):
                yield group.sums[begin:end]


def _leave_gradients(zero: Any) -> None:
    """Take from DeepSpeed's optimizer on the host the hooks that see gradients, and its buffers for them."""
    for hook in zero._grad_acc_hooks:
        hook.remove()
    zero.param_buffer_of_bit16_for_cpu_offload_groups.clear()
    zero.temp_grad_buffer_for_cpu_offload = zero.temp_grad_buffer_for_gpu_offload = None


class _Reducing(Zero):
    """DeepSpeed sums gradients over the ranks in every backward, and a rank keeps its part of them."""

    def begin(self, micro_batches: int) -> None:
        pass

    def forward(self, tokens: Tensor, labels: Tensor | None, documents: Tensor | None) -> Tensor:
        loss: Tensor = self._engine(tokens, labels, documents)
        return loss

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        raise AssertionError("a pipeline over ZeRO 2 or 3")


class ZeroTwo(_Reducing):
    """Stage 2: weights are whole on every rank."""

    def __init__(
        self, engine: Any, optimizer: torch.optim.AdamW, config: RunConfig, mesh: ParallelMesh, chunks: ModelStages
    ) -> None:
        super().__init__(engine, optimizer, config, mesh, chunks)
        self.partitions = self._zero.single_partition_of_fp32_groups
        self._update = self._zero.step
        # What DeepSpeed would read on the host, and clip by in a pass over the gradients.
        self._zero.scaled_global_norm = lambda *_: 1.0
        self._zero.unscale_and_clip_grads = lambda *_: None

    def step(self, share: Share) -> None:
        def update() -> None:
            sum_shares([gradient for parameter, gradient in self._gradients() if has_share(parameter)], self._mesh.tp)
            counted = (gradient.float() for parameter, gradient in self._gradients() if self._counts(parameter))
            with self._decided(counted, share):
                self._update()

        self._zero.step = update
        self._engine.step()

    def follow_masters(self) -> None:
        self._zero.update_lp_params()

    def _gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for index, parameters in enumerate(self._zero.params_in_partition):
            of = (part for part in self._zero.averaged_gradients[index] if not getattr(part, "_zero_padding", False))
            yield from zip(parameters, of, strict=False)


class ZeroThree(_Reducing):
    """Stage 3: weights lie cut as well, and are gathered where they are used."""

    def __init__(
        self, engine: Any, optimizer: torch.optim.AdamW, config: RunConfig, mesh: ParallelMesh, chunks: ModelStages
    ) -> None:
        super().__init__(engine, optimizer, config, mesh, chunks)
        self.partitions = self._zero.fp32_partitioned_groups_flat

    def step(self, share: Share) -> None:
        self._zero.step = partial(self._update, share)
        self._engine.step()

    @torch.no_grad()
    def _update(self, share: Share) -> None:
        """DeepSpeed's step, part by part, but for the norm and the clip."""
        zero, groups = self._zero, range(len(self.partitions))
        zero._pre_step()
        zero._partition_all_parameters()
        sum_shares([gradient for parameter, gradient in self._gradients() if has_share(parameter)], self._mesh.tp)
        counted = (gradient for parameter, gradient in self._gradients() if self._counts(parameter))
        with self._decided(counted, share):
            zero.zero_grad(set_to_none=True)
            for group in groups:
                zero._prepare_sub_group(group, set())
                zero._optimizer_step(group)
                zero._reassign_or_swap_out_partitioned_parameters(group)
                zero._release_sub_group(group, set())
        zero._post_step(set())

    def _gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for index, parameters in enumerate(self._zero.fp16_groups):
            yield from zip(parameters, self._zero.averaged_gradients[index], strict=True)

    def follow_masters(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()  # those that are whole now would stay as they are
        for index in range(len(self.partitions)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if kept_whole := zero.persistent_parameters:
            kept_whole[0].all_gather(kept_whole)
