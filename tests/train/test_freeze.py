"""Frozen weights: what does not move, what the rest does then, and what checkpoints hold of both."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megallama.checkpoint.reading.inspect import expected_shapes, inspect
from megallama.checkpoint.tensors import EXP_AVG, EXP_AVG_SQ, Stored, moment_name
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import open_data
from megallama.layout.counts import count_parameters, weight_shapes
from megallama.layout.frozen import frozen_weights
from megallama.layout.topology import Topology
from megallama.model.init import initialise
from megallama.model.llama import Llama
from megallama.parallel.launch import Launch
from megallama.parallel.spawn import run_ranks
from megallama.train.lr_schedule import learning_rate
from megallama.verify.compare import read_tensors
from megallama.verify.shrink import shrink_frozen
from tests.launching import arguments, events, losses, pretrain, pretrain_here

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
    loader, norms = open_data(config, Topology(), 0).train, []
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


def test_mfu_counts_no_gradients_of_frozen_weights(alone: Path, byte_dataset: str) -> None:
    """The two conventions tell what was counted: they differ by half of the attention."""
    model = config_of(words_of(byte_dataset, alone)).model
    qkv, o, mlp = 32 * (32 + 16 + 16), 32 * 32, 3 * 32 * 64
    frozen = (qkv + o + mlp) + qkv  # of layer 0 and of layer 2
    matmuls = 6 * count_parameters(model).matmul - 2 * frozen
    half = 6 * 4 * 32 * 32
    for event in events(alone, "train"):
        assert event["mfu"] / event["mfu_causal"] == pytest.approx((matmuls + 2 * half) / (matmuls + half), rel=1e-9)


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
    "pp2-host": (2, ["parallel.pipeline=2", "zero.offload_optimizer=cpu"]),
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
    "tp4": (4, ["parallel.tensor=4"]),  # of whose embedding the last rank has only padding
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


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, ["zero.stage=1"]),
        pytest.param(2, ["zero.stage=3"], marks=pytest.mark.layouts),
        pytest.param(2, ["zero.stage=2"], marks=pytest.mark.layouts),
        pytest.param(4, ["parallel.pipeline=4"], marks=pytest.mark.layouts),
        pytest.param(2, ["parallel.pipeline=2", "parallel.schedule=zbvzerobubble"], marks=pytest.mark.layouts),
    ],
)
def test_a_bf16_run_goes_on_bit_for_bit_from_where_it_was_stopped(
    world_size: int, overrides: list[str], byte_dataset: str, tmp_path: Path
) -> None:
    """Frozen weights are those that were drawn, rounded to bf16 as they are trained with."""
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:
            words = words_of(byte_dataset, tmp_path / name, "train.dtype=bf16", f"train.stop_after={stop}", *overrides)
            assert pretrain(world_size, words) == [(0, "")] * world_size
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (read_tensors(checkpoint(tmp_path / name)) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    model = Llama(load_config(words[1], words[2:]).model)
    initialise(model, model.shard_slices, seed=1234, num_layers=4)
    frozen = frozen_weights(model.config, FREEZE)
    for name, weight in logical(model).items():
        assert torch.equal(whole[name], weight.bfloat16().float()) == (name in frozen), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_only_what_is_trained_has_masters_moments_and_gradients(stage: int, byte_dataset: str, tmp_path: Path) -> None:
    words = words_of(byte_dataset, tmp_path / "run", f"zero.stage={stage}", "train.dtype=bf16", "train.stop_after=1")
    config = config_of(words)
    frozen = frozen_weights(config.model, FREEZE)
    shapes = weight_shapes(config.model)
    trained = sum(math.prod(shape) for name, shape in shapes.items() if name not in frozen)
    padding = (384 - 257) * 32  # of the head, whose matrix has whole tiles of rows; the embedding is frozen
    found = run_ranks(count_state, 2, words)
    assert sum(held["moments"] for held in found) == 2 * (trained + padding)
    assert sum(held["optimizer"] for held in found) == pytest.approx(3 * (trained + padding), rel=1e-3), "padded alone"
    assert [held["gradients of frozen"] for held in found] == [0, 0]
    assert Stored(checkpoint(tmp_path / "run", 1)).shapes == expected_shapes(config.model, frozen)


def count_state(launch: Launch, words: list[str]) -> dict[str, int]:
    """Elements of what this rank holds after its first backward."""
    held: dict[str, int] = {}

    def plant() -> None:
        import megallama.train.loop

        original = megallama.train.loop.train_step

        def count(run: Any) -> None:
            fragments, partitions = list(run.engine.fragments()), run.engine._partitions
            held["moments"] = sum(moment.numel() for f in fragments for moment in f.moments.values())
            state = [tensor for p in partitions for tensor in run.engine._optimizer.state[p].values()]
            held["optimizer"] = sum(tensor.numel() for tensor in [*partitions, *state])
            frozen = [p for p in run.model.parameters() if not p.requires_grad]
            assert len(frozen) == 1 + 6 + 2 + 1, "q, k and v are one, and so are gate and up"
            held["gradients of frozen"] = sum(p.grad is not None for p in frozen)

        def train_step(run: Any, *rest: Any) -> Any:
            step = run.engine.step
            run.engine.step = lambda *given: (count(run), step(*given))[1]
            return original(run, *rest)

        megallama.train.loop.train_step = train_step

    assert pretrain_here(launch, words, plant) == (0, "")
    return held


def test_another_list_takes_effect_where_the_run_goes_on(alone: Path, byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(checkpoint(alone, 2), checkpoint(run_dir, 2))
    words = words_of(byte_dataset, run_dir, "checkpoint.every=1", "train.stop_after=3", freeze=["lm_head.weight"])
    assert pretrain(1, words) == [(0, "")]
    assert [event["text"] for event in events(run_dir, "notice")] == [
        "train.freeze has changed: model.embed_tokens.weight and 14 more weights are trained from here on, "
        "with moments that start at zero",
        "train.freeze has changed: lm_head.weight is frozen from here on, and saved without moments",
    ]
    before, after = read_tensors(checkpoint(alone, 2)), read_tensors(checkpoint(run_dir, 3))
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert after.keys() == expected_shapes(config_of(words).model, {"lm_head.weight"}).keys()
    assert inspect(checkpoint(run_dir, 3)) == []
    beta1, beta2 = config_of(words).optimizer.betas
    for name in frozen_weights(config_of(words).model, FREEZE):
        gradient = after[moment_name(EXP_AVG, name)] / (1 - beta1)
        assert gradient.norm() > 0
        assert torch.allclose(after[moment_name(EXP_AVG_SQ, name)], (1 - beta2) * gradient.square(), rtol=1e-4), name
        assert not torch.equal(before[name], after[name])


def test_a_tied_matrix_is_frozen_as_embedding_and_head(byte_dataset: str, tmp_path: Path) -> None:
    tied = ["model.tie_word_embeddings=true", "train.stop_after=2"]
    words = words_of(byte_dataset, tmp_path / "run", *tied, freeze=["model.embed_tokens.weight"])
    assert pretrain(1, words) == [(0, "")]
    model = Llama(config_of(words).model)
    initialise(model, model.shard_slices, seed=1234, num_layers=4)
    weights = read_tensors(checkpoint(tmp_path / "run", 2))
    changed = {name for name, weight in logical(model).items() if not torch.equal(weight, weights[name])}
    assert changed == weight_shapes(model.config).keys() - {"model.embed_tokens.weight"}


REFUSED = {
    "no such name": (["model.layer.0.*"], [], "matches no weight; the nearest name is model.layers.0"),
    "nothing": ([""], [], "train.freeze names '', which matches no weight"),
    "a tied head": (["lm_head.*"], ["model.tie_word_embeddings=true"], "use model.embed_tokens.weight, which freezes"),
    "a part of q, k and v": (
        ["*.1.self_attn.q_proj.*"],
        [],
        "and not model.layers.1.self_attn.k_proj.weight and model.layers.1.self_attn.v_proj.weight, which are one "
        "matrix in memory; freeze all of them, as model.layers.1.self_attn.[qkv]_proj.weight, or none",
    ),
    "a part of gate and up": (["*.up_proj.*"], [], "as model.layers.0.mlp.[gu]*_proj.weight, or none"),
    "everything": (["*"], [], "train.freeze=[*] leaves nothing to train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_frozen_is_refused(case: str, byte_dataset: str, tmp_path: Path) -> None:
    freeze, more, sentence = REFUSED[case]
    ((code, said),) = pretrain(1, words_of(byte_dataset, tmp_path / "run", *more, freeze=freeze))
    assert code == 2
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_patterns_in_a_refusal_match_the_whole_matrix(byte_dataset: str, tmp_path: Path) -> None:
    model = config_of(words_of(byte_dataset, tmp_path)).model
    frozen = frozen_weights(
        model, ["model.layers.1.self_attn.[qkv]_proj.weight", "model.layers.0.mlp.[gu]*_proj.weight"]
    )
    assert len(frozen) == 3 + 2


def test_a_shrunk_run_freezes_each_kind_of_layer(byte_dataset: str, tmp_path: Path) -> None:
    model = config_of(words_of(byte_dataset, tmp_path)).model.model_copy(update={"num_hidden_layers": 32})
    patterns = ["model.embed_tokens.weight", "model.layers.[0-9].*", "model.layers.1[0-9].*norm*"]
    found = shrink_frozen(model, patterns, 3)
    assert set(found) == frozen_weights(
        model.model_copy(update={"num_hidden_layers": 3}), ["*embed*", "model.layers.0.*", "model.layers.1.*norm*"]
    )
    assert shrink_frozen(model, [], 3) == []


def test_weights_alone_begin_a_run_of_another_schedule_batch_layout_and_type(
    alone: Path, byte_dataset: str, tmp_path: Path
) -> None:
    """And of another list: of the run that they are from nothing else is left."""
    more = [f"checkpoint.init_from={checkpoint(alone)}", "train.dtype=bf16", "parallel.tensor=2", "train.steps=3"]
    schedule = ["schedule.kind=linear", "schedule.warmup_steps=1", "schedule.min_lr=0", "optimizer.lr=2e-3"]
    size = ["data.sequence_length=16", "train.global_batch_size=2", "train.seed=7", "data.validation_fraction=0.1"]
    words = words_of(byte_dataset, tmp_path / "run", *more, *schedule, *size, freeze=["*norm*"])
    assert pretrain(2, words) == [(0, "")] * 2
    found = events(tmp_path / "run", "train")
    assert [(event["step"], event["total_steps"], event["samples"]) for event in found] == [
        (1, 3, 2),
        (2, 3, 4),
        (3, 3, 6),
    ]
    assert [event["lr"] for event in found] == pytest.approx([2e-3, 1e-3, 0])
    old, new = read_tensors(checkpoint(alone)), read_tensors(checkpoint(tmp_path / "run", 3))
    for name in weight_shapes(config_of(words).model):
        assert torch.equal(new[name], old[name].bfloat16().float()) == ("norm" in name), name
