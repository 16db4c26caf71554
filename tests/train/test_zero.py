"""What a step moves, reads on the host and sends beside the model's own forward and backward."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.layout.topology import Topology
from megallama.parallel.clock import SPANS
from megallama.parallel.issued import Issued
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.train.spikes import Spikes

WRITTEN_ONLY = ("aten.copy_.default", "aten.zero_.default", "aten.fill_.Scalar", "aten.fill_.Tensor")
"""Operations that do not read what they write over."""
PIPELINE = ["parallel.pipeline=2", "train.micro_batch_size=1"]
SCHEDULES = {
    "none": [],
    "1f1b": [*PIPELINE, "parallel.schedule=1f1b"],
    "interleaved1f1b": [*PIPELINE, "parallel.schedule=interleaved1f1b"],
    "dualpipev": [*PIPELINE, "parallel.schedule=dualpipev"],
    "zbvzerobubble": [*PIPELINE, "parallel.schedule=zbvzerobubble", "model.tie_word_embeddings=true"],
}


class Moved(TorchDispatchMode):
    """Bytes that operations read and write, each of its tensors once; views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = func._schema.arguments
        if any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns):
            return result
        for value, argument in zip([*args, *(kwargs or {}).values()], given, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            reads = not (writes and str(func) in WRITTEN_ONLY)
            self.size += (reads + writes) * _bytes(value)
        if all(out.alias_info is None for out in func._schema.returns):
            self.size += _bytes(result)
        return result


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


class HostReads(TorchFunctionMode):
    """How often Python asks a tensor of the device for numbers; on a GPU each of these waits for it."""

    NAMES = frozenset(("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero"))

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # Here "cpu" is also the device, to which ZeRO 3 moves weights.
        to_host = name == "to" and "cpu" in args and (kwargs or {}).get("non_blocking", False)
        if name in self.NAMES or to_host:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class ScalarReads(TorchDispatchMode):
    """The same beneath Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        to_host = "_to_copy" in str(func) and str((kwargs or {}).get("device")) == "cpu" != given[0].device.type
        if "_local_scalar_dense" in str(func) or to_host:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def config(*overrides: str) -> RunConfig:
    """Of several groups of matrices."""
    words = ["train.device=cpu", "model.num_hidden_layers=4", "zero.bucket_elements=40000", "optimizer.clip=0.1"]
    words += ["data.sequence_length=16", "train.micro_batch_size=1", "train.global_batch_size=8"]
    return load_config("configs/debug.yaml", [*words, *overrides])


def build(launch: Launch, config: RunConfig) -> tuple[Any, Any, Any]:
    """Mesh, model and engine of this rank."""
    from megallama.train.run import build_model, draw_weights

    device = torch.device("cpu")
    launch.prepare(device)
    copies = launch.world_size // (config.parallel.pipeline * config.parallel.tensor)
    mesh = build_mesh(Topology(dp=copies, **config.parallel.sizes), launch, device)
    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine)
    return mesh, model, engine


def batches(config: RunConfig, seed: int, count: int) -> list[MicroBatch]:
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (count, config.train.micro_batch_size, config.data.sequence_length + 1), generator=draws)
    return [MicroBatch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in ids]


def moved_bytes(launch: Launch, config: RunConfig) -> list[float]:
    """By parameter: of a first gradient, of a later one, of the step."""
    _, model, engine = build(launch, config)
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    found = []
    engine._zero.begin(2)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with Moved() as moved:
            engine._zero.take(parameters)
        found.append(moved.size / size)
    with Moved() as moved:
        engine.step(1e-3)
    return [*found, moved.size / size]


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", [6, 10, 42]), ("fp32", [8, 12, 36])])
def test_gradients_and_the_step_move_no_byte_more_than_they_must(dtype: str, expected: list[int]) -> None:
    """The step: 4 for the norm, 32 for AdamW, which writes back gradients that it clips, and 6 for weights in bf16."""
    (found,) = run_ranks(moved_bytes, 1, config(f"train.dtype={dtype}"))
    assert found == pytest.approx(expected, rel=0.02)


def host_reads(launch: Launch, config: RunConfig) -> list[list[str]]:
    """Of each step but the first, in which DeepSpeed compares the order of ZeRO 3's weights over the ranks.

    And but two more, after which its clock begins where it is on.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import numa

    from megallama.train.step import train_step

    mesh, _, engine = build(launch, config)
    spikes = Spikes(6.0, 4, mesh.device)
    run: Any = SimpleNamespace(mesh=mesh, engine=engine, spikes=spikes)
    mine, found = batches(config, mesh.data.rank, 4), []
    waits = list[str]()
    get_accelerator().synchronize = lambda *_: waits.append("synchronize")
    numa.get_numa_cores = lambda: waits.append("a program that counts devices")
    for _ in range(3):
        train_step(run, mine, 1e-3)
    for _ in range(2):
        waits.clear()
        with HostReads() as asked, ScalarReads() as read:
            train_step(run, mine, 1e-3)
        found.append([*asked.names, *read.names, *waits])
    return found


READ = [
    *([f"zero.stage={stage}", f"train.dtype={dtype}"] for stage, dtype in product((1, 2, 3), ("bf16", "fp32"))),
    *([*PIPELINE, f"train.dtype={dtype}"] for dtype in ("bf16", "fp32")),
]


@pytest.mark.parametrize("overrides", READ, ids=" ".join)
def test_the_host_waits_for_the_device_once_in_a_step(overrides: list[str]) -> None:
    for rank in run_ranks(host_reads, 2, config(*overrides)):
        assert rank == [["to"]] * 2


def sent(launch: Launch, config: RunConfig) -> Any:
    """What crosses the ranks in a step, where it has begun by the end of the last backward, and in its midst."""
    mesh, _, engine = build(launch, config)
    sums = engine._zero._sums
    begun: list[int] = []
    sums._groups[0].parameters[0].register_hook(lambda _: begun.append(len(sums._on_its_way)))
    count = 8 // (mesh.data.size * config.train.micro_batch_size)
    rows = batches(config, mesh.data.rank, count)
    with Issued() as issued:
        engine.forward_backward(rows, torch.ones(()))
        at_end = len(sums._on_its_way)
        engine.step(1e-3)
    elements = sum(group.sums.numel() for group in sums._groups)
    return begun[-1] if begun else None, at_end, len(sums._groups), issued.size, issued.number, elements


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_group_of_gradients_sets_out_when_its_last_one_is_there(schedule: str) -> None:
    ranks = 2 if schedule == "none" else 4
    run = config("train.dtype=bf16", *SCHEDULES[schedule])
    for begun, at_end, groups, size, number, elements in run_ranks(sent, ranks, run):
        assert groups > 2
        assert at_end == groups
        if schedule == "none":
            assert begun == groups - 2  # all but the last of the matrices, and the norms
        assert (size["reduce_scatter"], number["reduce_scatter"]) == (4 * elements, groups)
        assert size["all_gather"] == 2 * elements
        assert size["all_reduce"] < 100 * len(SPANS)


def update(launch: Launch, config: RunConfig, lr: float = 1e-3) -> Any:
    """Masters after two steps of the same micro-batches, by place, and the norms."""
    mesh, _, engine = build(launch, config)
    count = 8 // (mesh.data.size * config.train.micro_batch_size)
    every = batches(config, 0, 8)
    norms = []

    def share(square: Tensor) -> tuple[Tensor, Tensor]:
        total = square.clone()
        dist.all_reduce(total)
        norms.append(float(total.sqrt()))
        return total.sqrt(), torch.zeros((), dtype=torch.bool)

    for _ in range(2):
        engine.forward_backward(every[mesh.data.rank * count :][:count], torch.full((), mesh.data.size / 128))
        engine.step(lr, share)
    return norms, [(f.parameter, f.start, f.master.clone()) for f in engine.fragments()]


@pytest.mark.parametrize("overrides", [[], ["zero.communication_dtype=bf16"], ["zero.stage=2"], ["zero.stage=3"]])
def test_every_stage_updates_what_one_rank_alone_does(overrides: list[str]) -> None:
    (norms, whole), *_ = run_ranks(update, 1, config())
    expected = {name: master for name, _, master in whole}
    few = 1e-2 if "communication" in str(overrides) else 1e-6
    for rank in run_ranks(update, 2, config(*overrides)):
        assert rank[0] == pytest.approx(norms, rel=few)
        for name, start, master in rank[1]:
            torch.testing.assert_close(
                master, expected[name][start : start + master.numel()], rtol=0, atol=1e-3 if few > 1e-3 else 1e-5
            )


@pytest.mark.parametrize("overrides", [[], ["train.dtype=bf16"], ["zero.stage=2"], ["zero.stage=3"]], ids=str)
def test_a_step_begins_without_the_gradients_of_the_one_before(overrides: list[str]) -> None:
    """At a learning rate of 0 the same micro-batches have the same gradient again."""
    for (first, second), _ in run_ranks(update, 2, config(*overrides), 0.0):
        assert first > 0
        assert second == pytest.approx(first, rel=1e-6)


def one_too_many(launch: Launch, config: RunConfig) -> None:
    _, model, engine = build(launch, config)
    engine.forward_backward(batches(config, 0, 2), torch.ones(()))
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(AssertionError, match="a gradient more than the schedule has backwards"):
        engine._zero.take([parameter])


def test_a_gradient_that_comes_too_late_is_an_error() -> None:
    run_ranks(one_too_many, 1, config())


def skipped(launch: Launch, config: RunConfig) -> bool:
    """Whether a step whose gradient is not finite on one rank alone leaves every bit of the state as it was."""
    mesh, model, engine = build(launch, config)
    before = [tensor.clone() for f in engine.fragments() for tensor in (f.master, *f.moments.values())]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    engine.forward_backward(batches(config, 0, 2), torch.full((), torch.inf if mesh.rank == 1 else 1.0))
    engine.step(1e-3)
    after = [tensor for f in engine.fragments() for tensor in (f.master, *f.moments.values())]
    pairs = [*zip(before, after, strict=True), *zip(weights, model.parameters(), strict=True)]
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("overrides", [[], ["train.dtype=bf16"], ["zero.stage=2"], ["zero.stage=3"], PIPELINE], ids=str)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(overrides: list[str]) -> None:
    assert run_ranks(skipped, 2, config(*overrides)) == [True, True]
