"""The plan's counts against the modules that training builds, made without memory, for every recipe."""

from __future__ import annotations

from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch

from megallama.config.load import load_config
from megallama.config.schema import DataConfig, ParallelConfig, RunConfig, Schedule
from megallama.layout.counts import VOCAB_MULTIPLE, count_parameters, weight_shapes
from megallama.layout.stages import stages
from megallama.model.layers import VOCABULARY_MULTIPLE
from megallama.model.llama import Llama, TensorParallelContext
from megallama.model.stages import ModelStages
from megallama.parallel.mesh import Axis
from megallama.plan.memory.state import rank_parameters
from tests.layout.test_counts import PUBLISHED

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@every_recipe
def test_the_total_is_that_of_the_logical_tensors(path: Path) -> None:
    model = load_config(path).model
    with torch.device("meta"):
        llama = Llama(model)
    shapes = {piece.name: piece.shape for pieces in llama.shard_slices.values() for piece in pieces}
    assert count_parameters(model).total == sum(prod(shape) for shape in shapes.values())


@every_recipe
@pytest.mark.parametrize("overrides", [[], ["model.tie_word_embeddings=true", "model.head_dim=6"]], ids=["", "tied"])
def test_names_and_shapes_of_weights_are_those_of_the_logical_tensors(path: Path, overrides: list[str]) -> None:
    model = load_config(path, overrides).model
    with torch.device("meta"):
        llama = Llama(model)
    shapes = {piece.name: piece.shape for pieces in llama.shard_slices.values() for piece in pieces}
    assert weight_shapes(model) == shapes


@every_recipe
def test_a_rank_holds_what_the_plan_says(path: Path) -> None:
    for tp in {1, 2, load_config(path).parallel.tensor}:
        assert_planned(load_config(path, [f"parallel.tensor={tp}"]))


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


def test_plan_and_layers_pad_the_vocabulary_alike() -> None:
    """`plan` imports no torch and so cannot take the number from the layers."""
    assert VOCAB_MULTIPLE == VOCABULARY_MULTIPLE
