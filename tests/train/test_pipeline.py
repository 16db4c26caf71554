"""What a pipeline's step costs beside its answer: the work it does, the messages it sends and the memory it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import megallama.train.pipeline
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.layout.check import check_config
from megallama.layout.topology import Topology
from megallama.parallel.issued import COLLECTIVES
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.train.pipeline import Pipeline, Stage

PP = 2
MICRO_BATCHES = 12


@dataclass(frozen=True)
class Cost:
    """Of one step on one rank."""

    flops: int
    collectives: int
    """Within tensor parallelism."""
    received_at_most: int
    """Messages in memory at once."""
    received_after: int
    """Messages in memory between steps, those of an evaluation included."""
    sent_at_most: int
    """Messages in memory at once."""
    sent_after: int
    """Messages in memory between steps, those of an evaluation included."""
    sizes: set[int]
    """Of messages, in elements."""


class Work(TorchDispatchMode):
    """FLOPs of matmuls and attention, and collectives."""

    flops, collectives = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.collectives += str(func) in COLLECTIVES
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def cost(launch: Launch, config: RunConfig) -> Cost:
    """Of the second step; the first sets up."""
    launch.prepare(torch.device("cpu"))
    from megallama.train.run import build_model

    batching = check_config(config, launch.world_size)
    topology = Topology(pp=config.parallel.pipeline, dp=batching.dp_size, tp=config.parallel.tensor)
    mesh = build_mesh(topology, launch, torch.device("cpu"))
    count = batching.gradient_accumulation_steps
    _, engine = build_model(config, mesh)
    pipeline = engine._passes
    assert isinstance(pipeline, Pipeline)
    tokens = torch.zeros(config.train.micro_batch_size, config.data.sequence_length, dtype=torch.int64)
    seen: list[int] = []
    allocate = megallama.train.pipeline._allocate

    def counted(*arguments: object) -> None:
        allocate(*arguments)  # type: ignore[arg-type]
        seen.append(received(pipeline))

    megallama.train.pipeline._allocate = counted
    sent: list[StorageWeakRef] = []
    sent_alive: list[int] = []
    sizes: set[int] = set()
    batch = megallama.train.pipeline._batch_p2p

    def watched(ops: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(StorageWeakRef(op.tensor.untyped_storage()) for op in ops)
        sent_alive.append(alive(sent))
        sizes.update(op.tensor.numel() for op in ops)
        return batch(ops)

    megallama.train.pipeline._batch_p2p = watched

    def step() -> Tensor:
        return engine.forward_backward([MicroBatch(tokens, tokens)] * count, torch.ones(()))

    step()
    engine.evaluate([MicroBatch(tokens, tokens)] * 3)
    with Work() as work:
        step()
    return Cost(work.flops, work.collectives, max(seen), received(pipeline), max(sent_alive), alive(sent), sizes)


def alive(storages: list[StorageWeakRef]) -> int:
    """Those whose memory is not free."""
    return sum(not storage.expired() for storage in storages)


def received(pipeline: Pipeline) -> int:
    """Buffers of messages that lie in memory, of every schedule."""
    stages = [
        s for runtime in (*pipeline._schedules.values(), *pipeline._evaluations.values()) for s in runtime._stages
    ]
    assert all(isinstance(stage, Stage) for stage in stages)
    every = [
        info for s in stages for infos in (s.args_recv_info, s.grad_recv_info) for i in infos.values() for info in i
    ]
    buffers = [getattr(info, "buffer", None) for info in every]  # the first stage has its inputs, not messages
    return sum(buffer is not None and buffer.device.type != "meta" for buffer in buffers)


def run(schedule: str, recompute: str = "none", tensor: int = 2) -> list[Cost]:
    overrides = [
        f"parallel.pipeline={PP}",
        f"parallel.schedule={schedule}",
        f"parallel.tensor={tensor}",
        f"train.global_batch_size={MICRO_BATCHES}",
        "train.micro_batch_size=1",
        f"train.recompute={recompute}",
        "model.num_hidden_layers=4",
    ]
    return run_ranks(cost, PP * tensor, load_config("configs/debug.yaml", overrides))


@pytest.mark.parametrize("schedule", ["dualpipev", "zbvzerobubble"])
def test_a_split_backward_does_the_work_of_a_whole_one(schedule: str) -> None:
    """Each matmul once and each collective once, whichever of its two parts it is in."""
    whole, split = run("1f1b"), run(schedule)
    assert sum(rank.flops for rank in split) == sum(rank.flops for rank in whole)
    assert sum(rank.collectives for rank in split) == sum(rank.collectives for rank in whole)


def test_a_split_backward_recomputes_a_layer_once_in_each_part() -> None:
    """A forward more than without a pipeline: 5 instead of 4 for each layer, not one for each of its weights."""
    whole, split = run("1f1b", "full", tensor=1), run("zbvzerobubble", "full", tensor=1)
    assert 1 < sum(rank.flops for rank in split) / sum(rank.flops for rank in whole) < 1.25


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"])
def test_messages_stay_in_memory_while_they_are_needed(schedule: str) -> None:
    """As many as are in flight, a few, however many micro-batches a step has; between steps none."""
    for rank in run(schedule, tensor=1):
        assert rank.received_after == 0
        assert 0 < rank.received_at_most <= 4
        assert rank.sent_after == 0
        assert 0 < rank.sent_at_most <= 8


def test_one_rank_of_a_tensor_parallel_group_sends_its_part_of_the_sequence_alone() -> None:
    config = load_config("configs/debug.yaml")
    whole = config.data.sequence_length * config.model.hidden_size
    for tensor, size in ((1, whole), (2, whole // 2)):
        assert [rank.sizes for rank in run("1f1b", tensor=tensor)] == [{size}] * PP * tensor
