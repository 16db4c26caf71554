"""The plan's counts against the modules that training builds, made without memory, for every recipe."""

from __future__ import annotations

import json
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megallama.config.data_keys import DataConfig
from megallama.config.load import load_config
from megallama.config.schema import ParallelConfig, RunConfig, Schedule
from megallama.hardware.gpus import built_in_hardware
from megallama.layout.counts import (
    VOCAB_MULTIPLE,
    attention_flops_per_token,
    count_parameters,
    flops_per_token,
    weight_shapes,
)
from megallama.layout.frozen import frozen_matmul, frozen_weights
from megallama.layout.stages import stages
from megallama.model.layers import VOCABULARY_MULTIPLE
from megallama.model.llama import Llama, TensorParallelContext
from megallama.model.stages import ModelStages
from megallama.parallel.mesh import Axis
from megallama.plan.memory.state import rank_parameters
from megallama.plan.time.software import Machine, known_software
from megallama.plan.time.step_time import rank_works
from tests.layout.test_counts import PUBLISHED

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@every_recipe
def test_the_total_is_that_of_the_logical_tensors(path: Path) -> None:
    model = load_config(path).model
    with torch.device("meta"):
        llama = Llama(model)
    shapes = {piece.name: piece.shape for pieces in llama.shard_slices.values() for piece in pieces}
    assert count_parameters(model).total == sum(prod(shape) for shape in shapes.values())


@every_recipe
@pytest.mark.parametrize(
    "overrides",
    [[], ["model.tie_word_embeddings=true", "model.head_dim=6"], ["model.qk_norm=true"]],
    ids=["", "tied", "qk_norm"],
)
def test_names_and_shapes_of_weights_are_those_of_the_logical_tensors(path: Path, overrides: list[str]) -> None:
    model = load_config(path, overrides).model
    with torch.device("meta"):
        llama = Llama(model)
    shapes = {piece.name: piece.shape for pieces in llama.shard_slices.values() for piece in pieces}
    assert weight_shapes(model) == shapes
    assert count_parameters(model).total == sum(map(prod, shapes.values()))


@every_recipe
def test_a_rank_holds_what_the_plan_says(path: Path) -> None:
    for tp in {1, 2, load_config(path).parallel.tensor}:
        for normed in (False, True):
            assert_planned(load_config(path, [f"parallel.tensor={tp}", f"model.qk_norm={normed}"]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "dualpipev"])
def test_a_pipeline_rank_holds_what_the_plan_says(schedule: str, tied: bool) -> None:
    """Tied where the V of the schedule ends on the rank where it began."""
    tie = f"model.tie_word_embeddings={tied and schedule == 'dualpipev'}"
    shape = ["model.num_hidden_layers=11", "parallel.pipeline=4", "parallel.tensor=2"]
    assert_planned(load_config(RECIPES[0], [*shape, f"parallel.schedule={schedule}", tie]))


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 4), (4, 2)])
def test_a_rank_of_a_published_model_holds_what_the_plan_says(name: str, tp: int, pp: int) -> None:
    model = PUBLISHED[name][0]
    schedule: Schedule = "dualpipev" if model.tie_word_embeddings else "1f1b"
    parallel = ParallelConfig(tensor=tp, pipeline=pp, schedule=schedule)
    assert_planned(RunConfig(model=model, data=DataConfig(path="none"), parallel=parallel))


def assert_planned(config: RunConfig) -> None:
    tp = config.parallel.tensor
    planned = rank_parameters(config)
    for place, tp_rank in product(range(config.parallel.pipeline), {0, tp - 1}):
        held = {stage.index: stage.layers for stage in stages(config) if stage.rank == place}
        with torch.device("meta"):
            chunks = ModelStages(config.model, stages(config), place, TensorParallelContext(Axis(None, tp_rank, tp)))
        assert sum(p.numel() for p in chunks.parameters()) == planned[place].total
        assert planned[place].stages == tuple(held)


HEADS = {False: "lm_head.weight", True: "model.embed_tokens.weight"}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("freeze", [[], ["*.mlp.*", "*norm*"], ["model.layers.1.*", "HEAD"]], ids=str)
def test_matmuls_are_those_that_torch_counts_also_where_weights_are_frozen(freeze: list[str], tied: bool) -> None:
    patterns = [HEADS[tied] if each == "HEAD" else each for each in freeze]
    words = ["model.vocab_size=256", f"model.tie_word_embeddings={tied}", f"train.freeze={json.dumps(patterns)}"]
    config = load_config(CONFIGS / "debug.yaml", [*words, "train.device=cpu", "data.sequence_length=16"])
    model = ModelStages(config.model, stages(config), 0, TensorParallelContext(Axis(None, 0, 1)))
    model.freeze(frozen_weights(config.model, patterns))
    tokens = torch.zeros(config.train.micro_batch_size, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counts = counter.get_flop_counts()["Global"].items()
    counted = sum(flops for kernel, flops in counts if str(kernel) in ("aten.mm", "aten.addmm", "aten.bmm"))
    attention = attention_flops_per_token(config.model, 16, "full")
    assert tokens.numel() * (flops_per_token(config.model, 16, "full", frozen_matmul(config)) - attention) == counted
    (work,) = rank_works(config, Machine(built_in_hardware()["h100-80g"], known_software()["megallama"], 0.5), 1)
    assert work.kernels.matmul_flops == counted
    assert work.parameters == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_plan_and_layers_pad_the_vocabulary_alike() -> None:
    """`plan` imports no torch and so cannot take the number from the layers."""
    assert VOCAB_MULTIPLE == VOCABULARY_MULTIPLE
