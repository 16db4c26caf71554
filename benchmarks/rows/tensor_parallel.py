"""Row C3: a step of two tensor-parallel ranks over gloo, beside torch's DTensor and megatron-core.

All contenders live in the same two processes of one thread each, hold the same weights, train on the same ids and take
turns. What a layer sends is what a model of three layers sends in forward and backward beyond one of two, as torch's
profiler sees it: every library comes to the same operators of c10d.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from contenders import megatron
from contenders.plain_llama import PlainLlama, fill, whole_weights
from contenders.steps import adamw, engine_step, initialised_llama, random_batches
from rows.table import Aim, Found, Line, median_ratio, spread
from rows.turns import Step, Turns, difference, take_turns
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh, build_mesh
from megallama.parallel.spawn import run_ranks

LOSS_TOLERANCE = 1e-5
LEAST_COLLECTIVES = 8
"""Of a layer with sequence parallelism: four in forward, four in backward (arXiv 2205.05198)."""
KINDS = {"allreduce": "all-reduce", "allgather": "all-gather", "reduce_scatter": "reduce-scatter"}
"""By what the name of an operator of c10d begins with."""


@dataclass(frozen=True)
class Contender:
    """A model with its optimizer on one rank."""

    step: Step
    """Of one micro-batch; its mean loss."""
    forward_backward: Callable[[MicroBatch], object]
    """The part of a step in which layers send."""


@dataclass(frozen=True)
class Rank:
    """What one rank saw."""

    turns: dict[str, Turns]
    collectives: dict[str, dict[str, tuple[int, int]]]
    """By contender: number and bytes of each kind, of one layer in forward and backward."""
    left_out: dict[str, str]
    """Contenders that cannot run, and why."""


def row(name: str, config: RunConfig, steps: int, rounds: int) -> Found:
    """All contenders of C3."""
    rank = run_ranks(measure, 2, config, steps, rounds, timeout=900.0)[0]
    found = Found(notes=[f"{contender} is left out: {why}" for contender, why in rank.left_out.items()])
    reference = rank.turns["ours, sequence parallel"]
    for contender, mine in rank.turns.items():
        differs = difference(reference.losses, mine.losses)
        if not differs <= LOSS_TOLERANCE:
            found.wrong.append(f"the losses of {contender} differ from ours by {differs:.1e}")
        same = "ours, sequence parallel" if "sequence" in contender else "ours"
        seconds = mine.all_seconds
        ratio = median_ratio(rank.turns[same].round_medians, mine.round_medians)
        counted = sent(rank.collectives[contender])
        found.lines.append(
            Line(name, contender, median(seconds), "ms", spread(seconds), ratio, None, None, differs, counted)
        )
        if not contender.startswith("ours"):
            found.aims.append(Aim(f"time {same} / {contender}", ratio, 1.0))
    number, size = (sum(each) for each in zip(*rank.collectives["ours, sequence parallel"].values(), strict=True))
    hidden = 4 * config.train.micro_batch_size * config.data.sequence_length * config.model.hidden_size
    found.aims.append(Aim("collectives of a layer, ours, sequence parallel", number, LEAST_COLLECTIVES))
    found.aims.append(Aim("their bytes, in hidden states", size / hidden, LEAST_COLLECTIVES))
    found.notes.append("counted: messages of a layer in forward and backward, MiB of the whole tensors")
    return found


def sent(collectives: dict[str, tuple[int, int]]) -> str:
    """A layer's collectives in words."""
    return ", ".join(f"{count} {kind} {size / 2**20:.1f}" for kind, (count, size) in sorted(collectives.items()))


def measure(launch: Launch, config: RunConfig, steps: int, rounds: int) -> Rank:
    """Of every contender, as one rank sees it."""
    launch.prepare(torch.device("cpu"))
    mesh = build_mesh(Topology(tp=2), launch, torch.device("cpu"))
    dtensors = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    makers: dict[str, Callable[[RunConfig], Contender]] = {
        "ours, sequence parallel": lambda config: ours(config, mesh, sequence=True),
        "ours": lambda config: ours(config, mesh, sequence=False),
        "DTensor, sequence parallel": lambda config: dtensor(config, dtensors, sequence=True),
        "DTensor": lambda config: dtensor(config, dtensors, sequence=False),
        "megatron-core, sequence parallel": lambda config: megatron_core(config, sequence=True),
        "megatron-core": lambda config: megatron_core(config, sequence=False),
    }
    made: dict[str, Step] = {}
    collectives, failed = {}, {}
    batch = next(random_batches(config))[0]
    for name, make in makers.items():
        try:
            collectives[name] = of_a_layer(make, config, batch)
            made[name] = make(config).step
        except Exception as error:
            said = str(error).strip().splitlines()
            failed[name] = f"{type(error).__name__}: {said[0] if said else ''}"
    # A contender that fails on one rank fails on all: they do the same.
    return Rank(take_turns(made, lambda: random_batches(config), steps, rounds), collectives, failed)


def of_a_layer(
    make: Callable[[RunConfig], Contender], config: RunConfig, batch: MicroBatch
) -> dict[str, tuple[int, int]]:
    """What a model of three layers sends beyond one of two."""
    three, two = (issued(make(with_layers(config, layers)), batch) for layers in (3, 2))
    numbers, sizes = three[0] - two[0], three[1] - two[1]
    return {kind: (numbers[kind], sizes[kind]) for kind in numbers}


def with_layers(config: RunConfig, layers: int) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"num_hidden_layers": layers})})


def issued(contender: Contender, batch: MicroBatch) -> tuple[Counter[str], Counter[str]]:
    """Collectives of a forward and backward by kind: their number, and the bytes of their whole tensors in fp32."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        contender.forward_backward(batch)
    events = sorted(profiler.events() or [], key=lambda event: event.time_range.start)
    asked = [event.name.removeprefix("c10d::").strip("_") for event in events if event.name.startswith("c10d::")]
    kinds = [next((KINDS[name] for name in KINDS if operator.startswith(name)), operator) for operator in asked]
    # Operators that take lists do not say how large these are; what gloo is given does.
    given = [prod(event.input_shapes[0]) for event in events if event.name.startswith("gloo:")]
    numbers, sizes = Counter[str](), Counter[str]()
    for kind, elements in zip(kinds, given, strict=True):
        numbers[kind] += 1
        sizes[kind] += 4 * elements * (dist.get_world_size() if kind == "all-gather" else 1)
    return numbers, sizes


def ours(config: RunConfig, mesh: ParallelMesh, *, sequence: bool) -> Contender:
    """megallama's training step."""
    parallel = config.parallel.model_copy(update={"tensor": 2, "sequence": sequence})
    step, engine = engine_step(config.model_copy(update={"parallel": parallel}), mesh)
    return Contender(
        step,
        lambda batch: engine.forward_backward([batch], torch.tensor(1.0 / batch.labels.numel())),
    )


def dtensor(config: RunConfig, mesh: Any, *, sequence: bool) -> Contender:
    """torch's `parallelize_module` with the plan of its tutorial, and its loss over a cut vocabulary."""
    model = PlainLlama(config.model, range(config.model.num_hidden_layers), config.data.sequence_length)
    fill(model, whole_weights(initialised_llama(config)))
    parallelize_module(model, mesh, outer_plan(sequence))
    for layer in model.layers.values():
        parallelize_module(layer, mesh, layer_plan(sequence))
    optimizer = adamw(list(model.parameters()), config)

    def forward_backward(batch: MicroBatch) -> Tensor:
        with loss_parallel():
            logits = model(batch.tokens)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
            loss.backward()
        return loss.full_tensor().detach() if isinstance(loss, DTensor) else loss.detach()

    def step(batches: list[MicroBatch]) -> Tensor:
        loss = forward_backward(*batches)
        clip(list(model.parameters()), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Contender(step, forward_backward)


@torch.no_grad()
def clip(parameters: list[nn.Parameter], most: float) -> None:
    """By the norm of all, DTensors and the plain tensors that norms are without sequence parallelism."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) is kind] for kind in (True, False)]
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole))
    for kind in kinds:
        scale = (most / total.clamp(min=most)).to(torch.float32)
        for parameter in kind:
            assert parameter.grad is not None
            parameter.grad *= scale if not isinstance(parameter, DTensor) else float(scale)


def outer_plan(sequence: bool) -> dict[str, Any]:
    """Of embedding, last norm and head."""
    cut = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=cut),
        "lm_head": ColwiseParallel(input_layouts=cut, output_layouts=Shard(-1), use_local_output=False),
    }
    return plan | ({"norm": SequenceParallel()} if sequence else {})


def layer_plan(sequence: bool) -> dict[str, Any]:
    """Of a decoder layer."""
    cut = Shard(1) if sequence else Replicate()
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel(output_layouts=cut) for name in ("self_attn.o_proj", "mlp.down_proj")}
    if sequence:
        gathered = {"input_layouts": (cut, None, None), "desired_input_layouts": (Replicate(), None, None)}
        plan |= {name: SequenceParallel() for name in ("input_layernorm", "post_attention_layernorm")}
        plan["self_attn"] = PrepareModuleInput(**gathered)
        plan["mlp"] = PrepareModuleInput(input_layouts=(cut,), desired_input_layouts=(Replicate(),))
    return plan


def megatron_core(config: RunConfig, *, sequence: bool) -> Contender:
    """megatron-core's GPTModel in a bare loop."""
    model = megatron.gpt_model(config, sequence, whole_weights(initialised_llama(config)))
    optimizer = adamw(list(model.parameters()), config)

    def step(batches: list[MicroBatch]) -> Tensor:
        loss = megatron.mean_loss(model, *batches)
        megatron.clip(model, config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Contender(step, lambda batch: megatron.mean_loss(model, batch))
