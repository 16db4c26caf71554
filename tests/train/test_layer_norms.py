"""Norms of layers are those of one process at every layout, and what autograd says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import arguments, events, pretrain

LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2 whole": (2, ["parallel.tensor=2", "parallel.sequence=false"]),
    "cp2": (2, ["parallel.context=2"]),
    "dp2 zero3 full": (2, ["zero.stage=3", "train.recompute=full"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2 dualpipev": (2, ["parallel.pipeline=2", "parallel.schedule=dualpipev"]),
    "pp2 zbv tp2": (4, ["parallel.pipeline=2", "parallel.schedule=zbvzerobubble", "parallel.tensor=2"]),
}


def words(dataset: str, run: Path, *more: str) -> list[str]:
    model = ["model.num_hidden_layers=5", "train.global_batch_size=8", "train.micro_batch_size=1"]
    return arguments(dataset, run, *model, "train.steps=4", "logging.layers_every=2", "evaluation.every=0", *more)


@pytest.fixture(scope="module")
def alone(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[float]]]:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert pretrain(1, words(byte_dataset, run)) == [(0, "")]
    found = events(run, "layers")
    assert [event["step"] for event in found] == [2, 4]
    for event in found:
        for name in ("activation_rms", "gradient_norm"):
            assert len(event[name]) == 5
            assert all(value > 0 for value in event[name])
    return found


@pytest.mark.layouts
@pytest.mark.parametrize("name", LAYOUTS)
def test_norms_of_layers_are_those_of_one_process(
    name: str, byte_dataset: str, alone: list[dict[str, list[float]]], tmp_path: Path
) -> None:
    ranks, layout = LAYOUTS[name]
    assert pretrain(ranks, words(byte_dataset, tmp_path / "run", *layout)) == [(0, "")] * ranks
    for found, expected in zip(events(tmp_path / "run", "layers"), alone, strict=True):
        for norms in ("activation_rms", "gradient_norm"):
            assert found[norms] == pytest.approx(expected[norms], rel=1e-5), norms
