"""The contenders of `step.py`: each builds the same model from the same weights and trains it in its own way.

All take the same micro-batches of random ids from the CPU, keep fp32 master weights, moments and gradient sums, clip
by the global norm, and decay matrices only, at a constant learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from contenders import apart, floor
from torch import Tensor, nn

from megallama.config.schema import ModelConfig, RunConfig
from megallama.data.loader import MicroBatch
from megallama.hardware.measure import Peak
from megallama.layout.check import check_config
from megallama.layout.topology import Topology
from megallama.model.init import initialise
from megallama.model.llama import Llama
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh, build_mesh
from megallama.run_dir.metrics import Metrics

if TYPE_CHECKING:
    from megallama.train.engine import Engine

PEERS = ("engine", "bare", "transformers", "transformers-autocast", "litgpt")
NAMES = (*PEERS, *(f"{name}-compile" for name in PEERS))

POOL = 4
"""Global batches that are drawn and then cycled: the model learns them by heart, so that wrong updates would show."""

Step = Callable[[], Tensor | float]
"""One optimizer step; returns the token mean of the loss before it, which may be on the device."""
SummedLoss = Callable[[Tensor, Tensor], Tensor]
"""(tokens, labels) of a micro-batch -> the sum of its losses."""


def random_batches(config: RunConfig) -> Iterator[list[MicroBatch]]:
    """The micro-batches of step after step, without end; the same ids for every contender."""
    draws = torch.Generator().manual_seed(config.train.seed)
    micro, length = config.train.micro_batch_size, config.data.sequence_length

    def micro_batch() -> MicroBatch:
        ids = torch.randint(config.model.vocab_size, (micro, length + 1), generator=draws)
        return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    accumulation = config.train.global_batch_size // micro
    return cycle([[micro_batch() for _ in range(accumulation)] for _ in range(POOL)])


def build(name: str, config: RunConfig, device: torch.device) -> Step:
    """The step of one contender of NAMES; raises what keeps it from being built."""
    if name == floor.NAME:
        return floor.floor_step(config, device)
    kind, *how = name.split("-")
    config = config.model_copy(update={"train": config.train.model_copy(update={"compile": "compile" in how})})
    if kind == "engine":
        batches, (step, _) = random_batches(config), engine_step(config, build_mesh(Topology(), Launch(), device))
        return lambda: step(next(batches))
    model = initialised_llama(config)
    if kind == "bare":
        if config.train.compile is True:
            model.compile_parts(layers=True)
        return bare_step(model, model, config, device)
    if kind == "litgpt":
        peer = apart.litgpt_llama(model, config)
        return bare_step(peer, apart.litgpt_loss(peer), config, device)
    reference = transformers_llama(model, config)
    return bare_step(reference, transformers_loss(reference), config, device, autocast="autocast" in how)


def engine_step(config: RunConfig, mesh: ParallelMesh) -> tuple[Callable[[list[MicroBatch]], float], Engine]:
    """megallama's own training step of given micro-batches, and the engine in it; all ranks of `mesh` call both."""
    # Imported here: it brings deepspeed with it, of which the other contenders stay free.
    from megallama.train.run import Run, build_model, draw_weights
    from megallama.train.step import train_step

    check_config(config, mesh.world.size)
    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine, Launch().processors)
    none: Any = None  # a step is given its batches, and saves and heeds nothing
    run = Run(config, mesh, model, engine, none, Metrics([]), none, none, none, none, Peak(1.0, "not used"), None)
    return lambda batches: train_step(run, batches, config.optimizer.lr).loss, engine


def bare_step(
    model: nn.Module, summed_loss: SummedLoss, config: RunConfig, device: torch.device, *, autocast: bool = False
) -> Step:
    """A loop as one would write it for one device, around `model`, whose loss `summed_loss` is.

    In bf16 the weights are copies of fp32 masters, or with `autocast` the masters themselves, cast in every forward.
    """
    model.to(device).train()
    weights, copies = list(model.parameters()), config.train.dtype == "bf16" and not autocast
    masters = [nn.Parameter(weight.detach().clone()) for weight in weights] if copies else weights
    if copies:
        for weight in weights:  # the parameters alone: rotary frequencies stay fp32
            weight.data = weight.data.bfloat16()
    optimizer = adamw(masters, config)
    batches = random_batches(config)

    def step() -> Tensor:
        micro_batches = next(batches)
        scale = 1 / sum(batch.labels.numel() for batch in micro_batches)
        total = torch.zeros((), device=device)
        for batch in micro_batches:
            tokens, labels = batch.tokens.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = summed_loss(tokens, labels) * scale
            loss.backward()
            total += loss.detach()
            if masters is not weights:
                add_gradients(weights, masters)
        nn.utils.clip_grad_norm_(masters, config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not weights:
            with torch.no_grad():
                for weight, master in zip(weights, masters, strict=True):
                    weight.copy_(master)
        return total

    return step


def add_gradients(weights: Sequence[nn.Parameter], masters: Sequence[nn.Parameter]) -> None:
    """Move the bf16 gradients of one micro-batch into the fp32 sums of the masters."""
    for weight, master in zip(weights, masters, strict=True):
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad += weight.grad
        weight.grad = None


def adamw(parameters: Sequence[nn.Parameter], config: RunConfig) -> torch.optim.AdamW:
    """torch's fused AdamW."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings = config.optimizer
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def initialised_llama(config: RunConfig) -> Llama:
    """The weights that the engine starts from, on the CPU."""
    model = Llama(config.model, recompute=config.train.recompute)
    layers, scheme, std = config.model.num_hidden_layers, config.model.init, config.model.initializer_range
    initialise(model, model.shard_slices, seed=config.train.seed, num_layers=layers, scheme=scheme, std=std)
    return model


def transformers_llama(ours: Llama, config: RunConfig) -> Any:
    """LlamaForCausalLM with sdpa and the weights of `ours`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**transformers_shape(config.model), attn_implementation="sdpa"))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, pieces in ours.shard_slices.items():
            for piece in pieces:
                parameters[piece.name].copy_(piece.of(ours.get_parameter(name)))
    if config.train.recompute == "full":
        model.gradient_checkpointing_enable()
    if config.train.compile:
        model.compile()
    return model


def transformers_shape(model: ModelConfig) -> dict[str, Any]:
    """Arguments of LlamaConfig."""
    shape = model.model_dump(exclude={"init", "rope_theta", "rope_scaling"})
    shape |= {"num_key_value_heads": model.kv_heads, "head_dim": model.head_size}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= model.rope_scaling.model_dump()
    return shape | {"rope_parameters": rope}


def transformers_loss(model: Any) -> SummedLoss:
    """Its own loss function, given labels that are shifted already and a count of 1 to divide by."""

    def summed(tokens: Tensor, labels: Tensor) -> Tensor:
        output = model(tokens, labels=labels, shift_labels=labels, num_items_in_batch=1, use_cache=False)
        loss: Tensor = output.loss
        return loss

    return summed
