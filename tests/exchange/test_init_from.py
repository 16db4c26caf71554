"""`checkpoint.init_from` takes the folder of another program: every weight in its place at every layout."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megallama.checkpoint.reading.store import load_weights
from megallama.config.importing import model_from_foreign
from megallama.exchange.incoming import import_folder
from tests.exchange.foreign import random_llama, save, write_meta_folder
from tests.launching import arguments, events, pretrain

# A step so small that no weight changes, not by its last bit.
STILL = [
    "train.steps=1",
    "optimizer.lr=1e-30",
    "train.dtype=fp32",
    "schedule.warmup_steps=0",
    "schedule.min_lr=0",
    "evaluation.every=0",
]
TP2_PP2 = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.schedule=zbvzerobubble"]


def model_words(folder: Path) -> list[str]:
    """The overrides that give a run the model of a folder."""
    path = next(found for found in (folder / "config.json", folder / "params.json") if found.exists())
    return [f"model={json.dumps(model_from_foreign(json.loads(path.read_text()), str(path)))}"]


def begin(dataset: str, run: Path, folder: Path, *more: str) -> list[str]:
    words = [word for word in arguments(dataset, run, *STILL) if not word.startswith("model.")]
    return [*words, *model_words(folder), f"checkpoint.init_from={folder}", *more]


@pytest.mark.parametrize(
    ("variant", "layout"),
    [("grouped", TP2_PP2), ("tied", TP2_PP2), ("tied", ["zero.stage=3"]), ("qwen3", TP2_PP2)],
    ids=["grouped-tp2-pp2", "tied-tp2-pp2", "tied-dp4-zero3", "qwen3-tp2-pp2"],
)
def test_every_weight_is_in_its_place(byte_dataset: str, tmp_path: Path, variant: str, layout: list[str]) -> None:
    model = random_llama(variant)
    folder = save(model, tmp_path / "model", max_shard_size="100KB")
    small = ["train.micro_batch_size=1"]
    assert pretrain(4, begin(byte_dataset, tmp_path / "run", folder, *layout, *small)) == [(0, "")] * 4
    weights = load_weights(tmp_path / "run" / "checkpoints" / "step_00000001")
    for name, tensor in model.named_parameters():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_nodes_whose_copies_differ_do_not_begin(kind: str, byte_dataset: str, tmp_path: Path) -> None:
    """One path, and another file system behind it on the second node: here another working directory."""
    for rank, change in ((0, 0.0), (1, 1e-3)):
        model = random_llama("grouped")
        next(iter(model.parameters())).data += change
        folder = save(model, tmp_path / str(rank) / "folder")
        run = tmp_path / f"run{rank}"
        assert pretrain(1, begin(byte_dataset, run, folder)) == [(0, "")]
        (run / "checkpoints" / "step_00000001").rename(tmp_path / str(rank) / "checkpoint")
    words = [word for word in begin(byte_dataset, tmp_path / "run", folder) if "init_from" not in word]
    words.append(f"checkpoint.init_from={kind}")
    sentence = f"checkpoint.init_from={kind} is not for rank 1 what it is for rank 0; give all nodes the same copy\n"
    for code, said in pretrain(2, words, plant=partial(own_directory, str(tmp_path))):
        assert (code, said.endswith(sentence)) == (2, True), said
    assert not (tmp_path / "run").exists()


def own_directory(folder: str) -> None:
    os.chdir(Path(folder, os.environ["RANK"]))


def test_metas_folder_and_the_import_of_it_begin_alike(byte_dataset: str, tmp_path: Path) -> None:
    folder = write_meta_folder(random_llama("grouped"), tmp_path / "meta", 2, cut_vocabulary=True)
    import_folder(folder, tmp_path / "imported", ["data.tokenizer=bytes", f"data.path={byte_dataset}"], None, None)
    assert pretrain(2, begin(byte_dataset, tmp_path / "a", folder, "parallel.tensor=2")) == [(0, "")] * 2
    words = [
        "--config",
        str(tmp_path / "imported" / "config.yaml"),
        *arguments(byte_dataset, tmp_path / "b", *STILL)[2:],
    ]
    words = [word for word in words if not word.startswith("model.")]
    assert pretrain(2, [*words, "parallel.pipeline=2"]) == [(0, "")] * 2
    first, second = (load_weights(tmp_path / name / "checkpoints" / "step_00000001") for name in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    (a,), (b,) = (events(tmp_path / name, "train") for name in "ab")
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_what_does_not_fit_is_refused_and_nothing_is_written(byte_dataset: str, tmp_path: Path) -> None:
    folder = save(random_llama(), tmp_path / "model")
    run = tmp_path / "run"

    def said(*more: str) -> str:
        ((code, words),) = pretrain(1, begin(byte_dataset, run, folder, *more))
        assert code == 2
        assert not run.exists()
        return words

    source = f"checkpoint.init_from={folder}"
    assert said("model.hidden_size=32").startswith(
        f"megallama: model.hidden_size=32 differs from 64 in {source}; use model.hidden_size=64, or import"
    )
    assert "model.qk_norm=true differs from false" in said("model.qk_norm=true")
    assert "model.rope_theta=20000.0 differs from 10000.0" in said("model.rope_theta=20000")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][5] = float("inf")
    save_file(state, folder / "model.safetensors")
    reason = "model.norm.weight is not finite in 1 of 64 elements"
    assert said() == f"megallama: {source} is damaged ({reason}); use another checkpoint\n"
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")
    assert f"{source} has no model.norm.weight" in said()


def test_more_positions_may_turn_slower_and_fewer_may_not(byte_dataset: str, tmp_path: Path) -> None:
    """From a model of 128 positions, and from the checkpoint of that run."""
    folder = save(random_llama(), tmp_path / "model")
    longer = ["model.max_position_embeddings=256", "data.sequence_length=256", "model.rope_theta=50000"]
    assert pretrain(1, begin(byte_dataset, tmp_path / "a", folder, *longer)) == [(0, "")]
    words = [word for word in begin(byte_dataset, tmp_path / "b", folder) if "init_from" not in word]
    words.append(f"checkpoint.init_from={tmp_path / 'a' / 'checkpoints' / 'step_00000001'}")
    stretched = ["model.max_position_embeddings=512", "data.sequence_length=512", "model.rope_theta=200000"]
    assert pretrain(1, [*words, *stretched]) == [(0, "")]
    before, after = (load_weights(tmp_path / name / "checkpoints" / "step_00000001") for name in "ab")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    ((code, said),) = pretrain(1, [*words[:-1], f"run.dir={tmp_path / 'c'}", words[-1]])
    assert code == 2
    assert "max_position_embeddings=128 differs from 256" in said
