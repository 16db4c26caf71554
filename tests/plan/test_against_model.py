"""The plan's counts against the modules that training builds, made without memory, for every recipe."""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import pytest
import torch

from megallama.config.load import load_config
from megallama.config.schema import ModelConfig
from megallama.model.llama import Llama, Seam
from megallama.parallel.layers import VOCABULARY_MULTIPLE
from megallama.parallel.mesh import Axis
from megallama.plan.params import VOCAB_MULTIPLE, count_parameters, layers_per_stage, rank_parameters

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def stages(model: ModelConfig, tp: Axis, pp_size: int) -> list[Llama]:
    """This tensor-parallel rank's module of each pipeline stage."""
    bounds = [0, *accumulate(layers_per_stage(model.num_hidden_layers, pp_size))]
    with torch.device("meta"):
        return [Llama(model, Seam(tp), layers=range(first, end)) for first, end in pairwise(bounds)]


@every_recipe
def test_the_total_is_that_of_the_logical_tensors(path: Path) -> None:
    model = load_config(path).model
    with torch.device("meta"):
        llama = Llama(model)
    shapes = {piece.name: piece.shape for pieces in llama.logical_pieces().values() for piece in pieces}
    assert count_parameters(model).total == sum(prod(shape) for shape in shapes.values())


@every_recipe
def test_a_rank_holds_what_the_plan_says(path: Path) -> None:
    config = load_config(path)
    model, pp = config.model, config.parallel.pipeline
    for tp in {1, 2, config.parallel.tensor}:
        planned = [rank.total for rank in rank_parameters(model, tp, pp)]
        for rank in {0, tp - 1}:
            built = stages(model, Axis(None, rank, tp), pp)
            assert [sum(p.numel() for p in stage.parameters()) for stage in built] == planned


def test_plan_and_layers_pad_the_vocabulary_alike() -> None:
    """`plan` imports no torch and so cannot take the number from the layers."""
    assert VOCAB_MULTIPLE == VOCABULARY_MULTIPLE
