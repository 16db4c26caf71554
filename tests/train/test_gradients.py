"""A step's gradient, norm and losses against autograd of the plain formula in fp64 on one device, at a few layouts."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.config.load import load_config
from megallama.config.schema import IGNORE_INDEX, RunConfig
from megallama.data.loader import open_data
from megallama.layout.check import check_config
from megallama.layout.frozen import frozen_weights
from megallama.layout.topology import Topology
from megallama.model.init import initialise
from megallama.model.llama import Llama
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.shards import boxes
from megallama.parallel.spawn import run_ranks
from tests.launching import needs_compiler

BATCH, EVALUATED = 8, 6
"""Sequences; those of an evaluation fill no two micro-batches of every rank."""
PP2 = ["parallel.pipeline=2", "train.micro_batch_size=1"]
BOTH = ["model.qk_norm=true", "optimizer.z_loss=0.05"]
ONE_KEY_HEAD = ["model.num_key_value_heads=1"]
LAYOUTS = {
    "dp2": (2, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "cp2": (2, ["parallel.context=2"]),
    "cp2-ulysses": (2, ["parallel.context=2", "parallel.context_mode=ulysses"]),
    "tp2-normed-one-key-head": (2, ["parallel.tensor=2", *BOTH, *ONE_KEY_HEAD]),
    "tp2-zero3-normed": (2, ["parallel.tensor=2", "zero.stage=3", *BOTH]),
    "tp2-bf16-normed": (2, ["parallel.tensor=2", "train.dtype=bf16", 'train.freeze=["*.1.input_layernorm*"]', *BOTH]),
    "pp2": (2, [*PP2, "parallel.schedule=1f1b"]),
    "pp2-dualpipev-bf16": (2, [*PP2, "parallel.schedule=dualpipev", "train.dtype=bf16"]),
    "tp2-pp2-zbvzerobubble-tied": (
        4,
        [*PP2, "parallel.tensor=2", "parallel.schedule=zbvzerobubble", "model.tie_word_embeddings=true"],
    ),
    "pp2-zbvzerobubble-normed": (2, [*PP2, "parallel.schedule=zbvzerobubble", "train.freeze=[lm_head.weight]", *BOTH]),
}
MORE_LAYOUTS = {
    "tp2-normed": (2, ["parallel.tensor=2", *BOTH]),
    "tp2-nosp-normed": (2, ["parallel.tensor=2", "parallel.sequence=false", "train.recompute=full", *BOTH]),
    "tp2-nosp-normed-one-key-head": (2, ["parallel.tensor=2", "parallel.sequence=false", *ONE_KEY_HEAD, *BOTH]),
    "cp2-normed": (2, ["parallel.context=2", *BOTH]),
    "cp2-ulysses-normed": (2, ["parallel.context=2", "parallel.context_mode=ulysses", *BOTH]),
    "tp2-zero2-normed": (2, ["parallel.tensor=2", "zero.stage=2", *BOTH]),
    "tp2-dp2-zero3-bf16-normed": (4, ["parallel.tensor=2", "zero.stage=3", "train.dtype=bf16", *BOTH]),
    "tp2-pp2-dualpipev-bf16-normed": (
        4,
        [*PP2, "parallel.tensor=2", "parallel.schedule=dualpipev", "train.dtype=bf16", *BOTH],
    ),
    "dp2-zero2-normed": (2, ["zero.stage=2", *BOTH]),
    "dp2-zero3-normed": (2, ["zero.stage=3", *BOTH]),
    "pp2-dualpipev-normed": (2, [*PP2, "parallel.schedule=dualpipev", "train.recompute=full", *BOTH]),
    "tp2-pp2-normed-tied": (
        4,
        [*PP2, "parallel.tensor=2", "parallel.schedule=zbvzerobubble", "model.tie_word_embeddings=true", *BOTH],
    ),
}
"""With norms of queries and keys and a z-loss."""


@dataclass(frozen=True)
class Step:
    """Of one device, or of one rank: then its part of the gradient, by logical name and place."""

    loss: float
    evaluation: float
    norm: float
    gradients: list[tuple[str, tuple[int, ...], Tensor]]
    """Before the clip."""


def config(dataset: str, *overrides: str) -> RunConfig:
    words = [f"data.path={dataset}", "data.sequence_length=16", "data.eod_mask_loss=true", "model.num_hidden_layers=4"]
    words += [f"train.global_batch_size={BATCH}", "train.device=cpu", "optimizer.clip=0.1"]
    return load_config("configs/debug.yaml", [*words, *overrides])


def step(launch: Launch, config: RunConfig, compiled: bool = False) -> Step:
    """One rank's; with what goes with every layout `compiled`."""
    launch.prepare(torch.device("cpu"))
    from megallama.train.evaluate import evaluate
    from megallama.train.run import build_model, draw_weights
    from megallama.train.step import train_step

    topology = Topology(dp=check_config(config, launch.world_size).dp_size, **config.parallel.sizes)
    mesh = build_mesh(topology, launch, torch.device("cpu"))
    data = open_data(config, topology, launch.rank)
    model, engine = build_model(config, mesh)
    if compiled:
        model.compile_parts(layers=False)
    draw_weights(config, model, engine)
    evaluation = evaluate(engine, data.train, EVALUATED, mesh)
    run: Any = SimpleNamespace(mesh=mesh, engine=engine, spikes=None)
    done = train_step(run, data.train.step(0), 0.0)
    # Adam's first moment is (1 - beta1) of the gradient, which was clipped.
    scale = max(done.grad_norm / config.optimizer.clip, 1) / (1 - config.optimizer.betas[0])
    parts = [
        (
            piece.name,
            tuple(offset),
            (scale * f.moments["exp_avg"][first - f.start :][: size.numel()].view(size)).clone(),
        )
        for f in engine.fragments()
        if f.moments  # none of what is frozen
        for piece in model.shard_slices[f.parameter]
        for offset, size, first in boxes(piece, f.start, f.start + f.master.numel())
    ]
    return Step(done.loss, evaluation, done.grad_norm, parts)


def alone(config: RunConfig) -> Step:
    """The same by plain autograd of the logits, in fp64 from weights in the type of training."""
    model = Llama(config.model)
    held, layers = model.shard_slices, config.model.num_hidden_layers
    initialise(model, held, seed=config.train.seed, num_layers=layers, std=config.model.initializer_range)
    if config.train.dtype == "bf16":
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.bfloat16())
    model.double()
    batches = open_data(config, Topology(), 0).train.step(0)
    tokens, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels"))
    counts = (labels != IGNORE_INDEX).sum(dim=1)
    assert len(set(counts.tolist())) > 1, "a mean of means would be right"
    logits = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    first = F.cross_entropy(logits[:EVALUATED].flatten(0, 1), labels[:EVALUATED].flatten(), ignore_index=IGNORE_INDEX)
    squares = logits.logsumexp(dim=-1)[labels != IGNORE_INDEX].square()
    (loss + config.optimizer.z_loss * squares.mean()).backward()
    frozen, whole = frozen_weights(config.model, config.train.freeze), {}
    for name, pieces in held.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        whole |= {piece.name: piece.of(gradient) for piece in pieces if piece.name not in frozen}
    norm = float(torch.stack([gradient.norm() for gradient in whole.values()]).norm())
    parts = [(name, (0,) * gradient.dim(), gradient) for name, gradient in whole.items()]
    return Step(float(loss.detach()), float(first.detach()), norm, parts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_one_device(layout: str, byte_dataset: str) -> None:
    assert_same(*LAYOUTS[layout], byte_dataset)


@pytest.mark.layouts
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_a_step_with_norms_and_a_z_loss_is_that_of_one_device(layout: str, byte_dataset: str) -> None:
    assert_same(*MORE_LAYOUTS[layout], byte_dataset)


@pytest.mark.layouts
@needs_compiler
@pytest.mark.parametrize("layout", ["dp2-zero3-normed", "pp2-dualpipev-normed"])
def test_parts_are_compiled_where_whole_layers_cannot_be(layout: str, byte_dataset: str) -> None:
    assert_same(*MORE_LAYOUTS[layout], byte_dataset, compiled=True)


def assert_same(ranks: int, overrides: list[str], byte_dataset: str, *, compiled: bool = False) -> None:
    run = config(byte_dataset, *overrides)
    expected, found = alone(run), run_ranks(step, ranks, run, compiled)
    few, many = (5e-3, 3e-2) if run.train.dtype == "bf16" else (1e-5, 1e-5)
    gradients = {name: torch.full_like(gradient, torch.nan) for name, _, gradient in expected.gradients}
    for rank in found:
        assert rank.loss == pytest.approx(expected.loss, rel=few)
        assert rank.evaluation == pytest.approx(expected.evaluation, rel=few)
        assert rank.norm == pytest.approx(expected.norm, rel=few)
        for name, offset, part in rank.gradients:
            gradients[name][tuple(slice(a, a + n) for a, n in zip(offset, part.shape, strict=True))] = part
    apart = {name: float((gradients[name] - whole).norm() / whole.norm()) for name, _, whole in expected.gradients}
    assert {name: distance for name, distance in apart.items() if not distance < many} == {}
