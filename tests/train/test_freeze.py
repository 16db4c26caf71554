"""Frozen weights: what does not move, what the rest does then, and what checkpoints hold of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megallama.checkpoint.reading.inspect import inspect
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import open_data
from megallama.layout.frozen import frozen_weights
from megallama.model.init import initialise
from megallama.model.llama import Llama
from megallama.train.lr_schedule import learning_rate
from megallama.verify.compare import read_tensors
from tests.launching import arguments, events, pretrain

FREEZE = ["model.embed_tokens.weight", "model.layers.0.*", "*.3.*norm*", "model.layers.2.self_attn.[qkv]*"]
FOUR_LAYERS = ["model.num_hidden_layers=4", "train.micro_batch_size=1", "checkpoint.every=2", "optimizer.clip=0.05"]


def words_of(dataset: str, run_dir: Path, *more: str, freeze: list[str] = FREEZE) -> list[str]:
    return arguments(dataset, run_dir, *FOUR_LAYERS, f"train.freeze={json.dumps(freeze)}", *more)


def config_of(words: list[str]) -> RunConfig:
    return load_config(words[1], words[2:])


def checkpoint(run_dir: Path, step: int = 4) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


@pytest.fixture(scope="module")
def alone(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert pretrain(1, words_of(byte_dataset, run_dir)) == [(0, "")]
    return run_dir


def plain_loop(config: RunConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights before and after, and norms, of a loop that knows nothing of engines: torch's AdamW over the rest."""
    model = Llama(config.model)
    scheme = config.model.init
    initialise(model, model.shard_slices, seed=config.train.seed, num_layers=4, scheme=scheme)
    frozen = frozen_weights(config.model, config.train.freeze)
    held = {name: tuple(piece.name for piece in pieces) for name, pieces in model.shard_slices.items()}
    trained: list[nn.Parameter] = [p for name, p in model.named_parameters() if not frozen & set(held[name])]
    groups = [
        {"params": [p for p in trained if p.dim() == 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=config.optimizer.eps)
    loader, norms = open_data(config, 0, 1).train, []
    before = logical(model)
    for step in range(4):
        batches = loader.step(step * config.train.global_batch_size)
        labels = sum(int((batch.labels >= 0).sum()) for batch in batches)
        model.zero_grad()
        for batch in batches:
            (model(batch.tokens, batch.labels) / labels).backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained, config.optimizer.clip)))
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step + 1, 4, config.optimizer.lr, config.schedule)
        adamw.step()
    return before, logical(model), norms


def logical(model: Llama) -> dict[str, Tensor]:
    return {
        piece.name: piece.of(model.get_parameter(name)).detach().clone()
        for name, pieces in model.shard_slices.items()
        for piece in pieces
    }


def assert_close(run_dir: Path, other: dict[str, Tensor], start: dict[str, Tensor], frozen: frozenset[str]) -> None:
    """Frozen weights are those of the start to the bit; the others went the same way to a thousandth."""
    tensors = read_tensors(checkpoint(run_dir))
    for name, weight in start.items():
        if name in frozen:
            assert torch.equal(tensors[name], weight), name
        else:
            way = other[name] - weight
            assert way.norm() > 0, name
            assert (tensors[name] - other[name]).norm() < 1e-3 * way.norm(), name


def test_frozen_weights_stay_and_the_rest_trains_as_in_a_plain_loop(alone: Path, byte_dataset: str) -> None:
    config = config_of(words_of(byte_dataset, alone))
    assert config.optimizer.weight_decay > 0
    start, end, norms = plain_loop(config)
    frozen = frozen_weights(config.model, FREEZE)
    assert len(frozen) == 1 + 9 + 2 + 3
    assert_close(alone, end, start, frozen)
    reported = [event["grad_norm"] for event in events(alone, "train")]
    assert reported == pytest.approx(norms, rel=1e-4)
    assert min(norms) > config.optimizer.clip, "every step is clipped"


LAYOUTS = {
    "dp2-zero1": (2, ["zero.stage=1"]),
    "dp2-zero2": (2, ["zero.stage=2"]),
    "dp2-zero3": (2, ["zero.stage=3", "train.recompute=full"]),
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
}
MORE_LAYOUTS = {
    "tp2-nosp": (2, ["parallel.tensor=2", "parallel.sequence=false", "train.recompute=selective"]),
    "tp2-pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "pp4": (4, ["parallel.pipeline=4"]),
    "pp2-interleaved1f1b": (2, ["parallel.pipeline=2", "parallel.schedule=interleaved1f1b"]),
    "pp2-dualpipev": (2, ["parallel.pipeline=2", "parallel.schedule=dualpipev"]),
    "pp2-zbvzerobubble": (2, ["parallel.pipeline=2", "parallel.schedule=zbvzerobubble", "train.recompute=full"]),
    "tp2-pp2-zbvzerobubble": (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.schedule=zbvzerobubble"]),
    "tp2-dp2-zero3": (4, ["parallel.tensor=2", "zero.stage=3"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_does_the_same(layout: str, alone: Path, byte_dataset: str, tmp_path: Path) -> None:
    assert_same_as_alone(*LAYOUTS[layout], alone, byte_dataset, tmp_path / "run")


@pytest.mark.layouts
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_any_other_layout_does_the_same(layout: str, alone: Path, byte_dataset: str, tmp_path: Path) -> None:
    assert_same_as_alone(*MORE_LAYOUTS[layout], alone, byte_dataset, tmp_path / "run")


def assert_same_as_alone(world_size: int, overrides: list[str], alone: Path, dataset: str, run_dir: Path) -> None:
    words = words_of(dataset, run_dir, *overrides)
    assert pretrain(world_size, words) == [(0, "")] * world_size
    config = config_of(words)
    model = Llama(config.model)
    initialise(model, model.shard_slices, seed=config.train.seed, num_layers=4)
    assert_close(run_dir, read_tensors(checkpoint(alone)), logical(model), frozen_weights(config.model, FREEZE))
    for ours, theirs in zip(events(run_dir, "train"), events(alone, "train"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert inspect(checkpoint(run_dir)) == []
