"""Forward and backward through pipeline stages: schedules of `torch.distributed.pipelining`, and evaluation of our own.

Every rank reads the batch's tokens itself, so that only hidden states (1/tp of them under sequence parallelism) and
their gradients cross between stages. The loss is divided by the labels of the global batch inside the loss function:
the schedules' own scaling would come after the optimizer has taken the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    FORWARD,
    FULL_BACKWARD,
    RECV_B,
    SEND_F,
    _Action,
    _add_send_recv,
    _batch_p2p,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
    get_schedule_class,
)
from torch.distributed.pipelining.stage import _RecvInfo
from torch.utils.checkpoint import GraphExecGroup

from megallama.config.schema import ParallelConfig, RunConfig
from megallama.data.loader import MicroBatch
from megallama.layout.schedules import Action, action_lists, schedule_of
from megallama.model.layers import GradientFilter
from megallama.model.stages import ModelStages
from megallama.parallel.clock import Clock
from megallama.parallel.mesh import ParallelMesh

TakeGradients = Callable[[Iterable[nn.Parameter]], None]


def make_schedule(
    parallel: ParallelConfig,
    stages: Sequence[Any],
    lists: Sequence[Sequence[Action]],
    loss: Callable[..., Tensor] | None = None,
) -> _PipelineScheduleRuntime:
    """The schedule of the run over this rank's `stages`; `lists` are what each rank computes in a step.

    torch's own 1F1B is a loop that waits for each message to arrive before it computes on; the runtime of the other
    schedules waits only for what it needs, so 1F1B runs there as well, from a list of ours.
    """
    name, micro_batches = schedule_of(parallel).torch_name, 1 + max(action.micro_batch for action in lists[0])
    if name is not None:
        kind: Any = get_schedule_class(name)
        made: _PipelineScheduleRuntime = kind(stages, micro_batches, loss_fn=loss, scale_grads=False)
        return made
    runtime = _PipelineScheduleRuntime(stages, micro_batches, loss_fn=loss, scale_grads=False)
    runtime.pipeline_order = {rank: _as_torch(actions) for rank, actions in enumerate(lists)}
    runtime._prepare_schedule_with_comms(runtime.pipeline_order)
    return runtime


def _as_torch(actions: Sequence[Action]) -> list[_Action | None]:
    """The list in torch's words."""
    kinds = {"F": FORWARD, "B": FULL_BACKWARD}
    return [_Action(action.stage, kinds[action.kind], action.micro_batch) for action in actions]


class Pipeline:
    """This rank's stages under the schedule of the run, laid out for every number of micro-batches that a step has.

    `take_gradients` is called with a stage's parameters after each backward that computed weight gradients outside
    autograd's hooks.
    """

    def __init__(
        self,
        chunks: ModelStages,
        config: RunConfig,
        mesh: ParallelMesh,
        take_gradients: TakeGradients,
    ) -> None:
        self._chunks, self._config, self._mesh = chunks, config, mesh
        self._ranks = chunks.ranks
        self._scale = torch.ones((), device=mesh.device)
        self._take = take_gradients
        if schedule_of(config.parallel).splits_backward != "never":
            # A compiled kernel, such as that of attention within documents, would write over what it has saved, and
            # refuse a backward in two parts after one in one.
            torch._functorch.config.donated_buffer = False
        self._schedules: dict[int, _PipelineScheduleRuntime] = {}
        self._evaluations: dict[int, _PipelineScheduleRuntime] = {}

    def forward_backward(self, batches: Iterable[MicroBatch], scale: Tensor) -> Tensor:
        """Run every micro-batch; the sum of their losses times `scale` where the last stage is, elsewhere 0."""
        self._scale = scale
        losses: list[Tensor] = []
        every = list(batches)
        arguments, labels = self._inputs(every)
        schedule = self._schedule(len(every), every[0].tokens.shape)
        with self._mesh.pp.timed():
            schedule.step(*arguments, **labels, losses=losses, return_outputs=False)
            for stage in schedule._stages:
                stage.clear_runtime_states()
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self._mesh.device)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Tensor:
        """The summed loss where the last stage is, elsewhere 0. Forward only: touches no gradient and no generator."""
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        every, size = list(batches), len(self._ranks)
        for first in range(0, len(every), size):  # as many as fill the pipeline, since their outputs are all kept
            group = every[first : first + size]
            losses: list[Tensor] = []
            arguments, labels = self._inputs(group)
            schedule = self._forward_schedule(len(group), group[0].tokens.shape)
            schedule.eval(*arguments, **labels, losses=losses, return_outputs=False)
            for loss in losses:
                total += loss
            for stage in schedule._stages:
                stage.clear_runtime_states()
        return total

    def _inputs(self, batches: list[MicroBatch]) -> tuple[list[Tensor], dict[str, Any]]:
        """What the stages of this rank take of the micro-batches, one after the other along the batch."""
        arguments = [torch.cat([batch.tokens for batch in batches])] if self._holds(0) else []
        labels = torch.cat([batch.labels for batch in batches])
        named = {"target": labels} | ({"labels": labels} if self._holds(len(self._ranks) - 1) else {})
        if documents := [batch.documents for batch in batches if batch.documents is not None]:
            named["documents"] = torch.cat(documents)
        return arguments, named

    def _holds(self, stage: int) -> bool:
        return self._ranks[stage] == self._mesh.pp.rank

    def _scaled(self, loss: Tensor, _: Tensor) -> Tensor:
        return loss * self._scale

    def _schedule(self, micro_batches: int, shape: torch.Size) -> _PipelineScheduleRuntime:
        if micro_batches not in self._schedules:
            stages, parallel = self._make_stages(shape), self._config.parallel
            runtime = make_schedule(parallel, stages, action_lists(parallel, micro_batches), self._scaled)
            for stage in stages:
                if not stage.is_first:
                    stage.order_before = runtime.pipeline_order_with_comms[self._ranks[stage.stage_index - 1]]
            self._schedules[micro_batches] = runtime
        return self._schedules[micro_batches]

    def _forward_schedule(self, micro_batches: int, shape: torch.Size) -> _PipelineScheduleRuntime:
        """Each rank runs its forwards in the order of one clock, so none waits in a circle.

        Over torch's own list for DualPipeV `eval()` runs a backward, in which one rank raises and the others hang.
        """
        if micro_batches not in self._evaluations:
            stages, ranks = self._make_stages(shape), dict(enumerate(self._ranks))
            runtime = _PipelineScheduleRuntime(stages, micro_batches, loss_fn=lambda loss, _: loss)
            runtime.stage_index_to_group_rank = ranks
            for stage in stages:
                stage.stage_index_to_group_rank = ranks
            clock = sorted((stage + m, stage, m) for stage in ranks for m in range(micro_batches))
            forwards: dict[int, list[_Action]] = {
                rank: [_Action(stage, FORWARD, m) for _, stage, m in clock if ranks[stage] == rank]
                for rank in range(self._mesh.pp.size)
            }
            runtime.pipeline_order_with_comms = _add_send_recv(forwards, ranks.__getitem__, len(ranks))
            self._evaluations[micro_batches] = runtime
        return self._evaluations[micro_batches]

    def _make_stages(self, shape: torch.Size) -> list[Stage]:
        """For micro-batches of that shape, which is the same in every step."""
        (batch, length), count, device = shape, len(self._ranks), self._mesh.device
        dtype = torch.bfloat16 if self._config.train.dtype == "bf16" else torch.float32
        cut = self._mesh.tp.size if self._config.parallel.sequence_parallel else 1
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        sent = (length // cut, batch, self._config.model.hidden_size)

        def hidden() -> Tensor:
            return torch.empty(sent, dtype=dtype, device="meta", requires_grad=True)

        loss = torch.empty((), device="meta", requires_grad=True)
        return [
            Stage(
                model,
                index,
                count,
                device,
                input_args=tokens if index == 0 else hidden(),
                output_args=loss if index == count - 1 else hidden(),
                group=self._mesh.pp.group,
                clock=self._mesh.clock,
                part=self._chunks.tp_context.part,
                take_gradients=self._take,
            )
            for index, model in zip(self._chunks.indices, self._chunks.models, strict=True)
        ]


class Stage(PipelineStage):
    """torch's stage, with four things mended.

    - Weight gradients of a split backward are written into `grad` by torch itself, past the hooks in which ZeRO takes
      them: left there, they would not be in the sums. This one hands them over.
    - A split backward runs autograd functions and recomputation more often than it has to.
    - What is received from other stages lies in memory while it is needed, and not from the first step to the last,
      a buffer for each micro-batch of a step.
    - What is sent lies in memory until it must have arrived, and not until the end of the step.
    """

    def __init__(
        self, *args: Any, clock: Clock, part: GradientFilter, take_gradients: TakeGradients, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._clock, self._part, self._take = clock, part, take_gradients
        # torch lets go of the graph between the two parts of a backward, before 2.13 too early for Python's functions.
        self._graphs: dict[int, list[GradientEdge]] = {}
        self.order_before: Sequence[_Action] = ()
        """In a step, of the rank that holds the stage before."""
        self._sent_outputs: dict[int, list[dist.Work]] = {}
        self._sent_gradients: dict[int, list[dist.Work]] = {}

    @cached_property
    def arrived(self) -> dict[int, list[int]]:
        """By the micro-batch of an input: the sent gradients that must have arrived when it is here."""
        return arrived_gradients(self.order_before, self.stage_index - 1)

    def clear_runtime_states(self) -> None:
        for sent in (self._sent_outputs, self._sent_gradients):
            while sent:
                _wait_batch_p2p(sent.popitem()[1])
        super().clear_runtime_states()

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._clock.span("forward"):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _free(self.args_recv_info[fwd_chunk_id])
        for gradient in self.arrived.get(fwd_chunk_id, ()):
            _wait_batch_p2p(self._sent_gradients.pop(gradient))
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if not full_backward:
            outputs, _ = self.fwd_cache[bwd_chunk_id]
            # A first stage that is frozen has no graph.
            self._graphs[bwd_chunk_id] = [get_gradient_edge(output) for output in outputs if output.requires_grad]
        with self._clock.span("backward"), nullcontext() if full_backward else self._part.only("inputs"):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if loss is not None and full_backward:
            loss.detach_()  # it is kept to the end of the step, and with its graph what this stage received
        _free(self.grad_recv_info[bwd_chunk_id])
        _wait_batch_p2p(self._sent_outputs.pop(bwd_chunk_id, []))  # its gradient is here

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        # torch leaves the whole backward of the first stage to this part. It goes through the weights one by one: a
        # layer that is recomputed would be so for each of them.
        part = nullcontext() if self.is_first else self._part.only("weights")
        with self._clock.span("backward"):
            with part, GraphExecGroup():
                super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
            del self._graphs[bwd_chunk_id]
            self._take(self.submod.parameters())

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        _allocate(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        _allocate(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._sent_outputs[fwd_chunk_id] = _batch_p2p(super().get_fwd_send_ops(fwd_chunk_id))
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._sent_gradients[bwd_chunk_id] = _batch_p2p(super().get_bwd_send_ops(bwd_chunk_id))
        return []

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 greets the neighbours of each stage: in a V one is this rank itself, which gloo refuses.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _create_grad_recv_info(self, act_send_info: dict[int, Any]) -> tuple[_RecvInfo, ...]:
        with self._without_memory():
            return super()._create_grad_recv_info(act_send_info)

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device


def arrived_gradients(order: Iterable[_Action], stage: int) -> dict[int, list[int]]:
    """By each output that `stage` sends: the gradients that it has asked for since the output before."""
    arrived: dict[int, list[int]] = {}
    gradients: list[int] = []
    for action in order:
        if action.stage_index == stage and action.microbatch_index is not None:
            if action.computation_type == RECV_B:
                gradients.append(action.microbatch_index)
            elif action.computation_type == SEND_F:
                arrived[action.microbatch_index], gradients = gradients, []
    return arrived


def _allocate(received: Iterable[Any], device: torch.device) -> None:
    for info in received:
        info.buffer = torch.empty_like(info.buffer, device=device, requires_grad=info.buffer.requires_grad)


def _free(received: Iterable[Any]) -> None:
    for info in received:
        if isinstance(info, _RecvInfo) and info.buffer is not None:  # else what the first stage is given
            info.buffer = torch.empty_like(info.buffer, device="meta", requires_grad=info.buffer.requires_grad)
