"""Checkpoints whose hashes are right and whose words are not: told in a sentence, read by nothing, passed over.

What a hash cannot find is made here by the thousand: values in manifests, tables of tensors and states are replaced,
dropped, repeated and nested, and sealed anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megallama.checkpoint.format import (
    FORMAT,
    MANIFEST,
    STATE,
    TENSORS,
    File,
    folder_name,
    hash_file,
    write_bytes,
    write_json,
)
from megallama.checkpoint.reading.inspect import expected_shapes, inspect, promised
from megallama.checkpoint.reading.store import agree, check_weights, confirm, load_weights, pick_start
from megallama.checkpoint.state import DataIdentity, TrainState, read_saved, state_document
from megallama.checkpoint.writing.commit import commit
from megallama.cli import app
from megallama.config.load import load_config
from megallama.config.schema import ModelConfig, RunConfig
from megallama.errors import UserError
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh, build_mesh
from tests.checkpoint.damaging import copy_as, edit, rewrite
from tests.checkpoint.mutating import mutated
from tests.launching import ROOT

T = TypeVar("T")
EXAMPLES = 500
DATA = DataIdentity("f" * 64, 7, 2048)
MODEL = ModelConfig(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2, head_dim=2
)
LAYOUT = {"tensor": 1, "pipeline": 1, "schedule": "1f1b", "data": 2, "zero_stage": 1, "dtype": "fp32"}
OLDER, NEWER = 2, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two sound checkpoints, of a model of a hundred parameters that two ranks have saved."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    unfinished = folder / "unfinished"
    unfinished.mkdir(parents=True)
    written: dict[str, File] = {}
    table: dict[str, Any] = {}
    content = {f"rank_{rank:05d}.bin": bytearray() for rank in range(2)}
    numbers = np.random.default_rng(0)
    for name, shape in expected_shapes(MODEL).items():
        table[name] = {"shape": list(shape), "chunks": []}
        for half, (file, taken) in enumerate(content.items()):  # half of its rows by each
            rows = [shape[0] // 2, shape[0] - shape[0] // 2][half]
            part = [rows, *shape[1:]]
            offset = [half * (shape[0] // 2), *([0] * (len(shape) - 1))]
            table[name]["chunks"].append({"offset": offset, "shape": part, "file": file, "start": len(taken)})
            taken += numbers.random(math.prod(part), dtype=np.float32).tobytes()
    for file, taken in content.items():
        written[file] = write_bytes(unfinished / file, bytes(taken))
    state = state_document(TrainState(OLDER, 8, OLDER, 2.5, 4), 2.25, True, DATA, MODEL, LAYOUT)
    documents = {TENSORS: {"dtype": "float32", "tensors": table}, STATE: state}
    commit(unfinished, folder / folder_name(OLDER), written, documents, 1e9, {"torch": "2.13.0"})
    copy_as(folder / folder_name(OLDER), NEWER)
    return folder.parent


@pytest.fixture(scope="module")
def mesh() -> Iterator[ParallelMesh]:
    """One rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_mesh(Topology(pp=1, dp=1, tp=1), Launch(), torch.device("cpu"))
    dist.destroy_process_group()


def config_of(run: Path, **checkpoint: object) -> RunConfig:
    tree = load_config(ROOT / "configs" / "debug.yaml").model_dump()
    tree |= {"model": MODEL.model_dump(), "run": {"dir": str(run)}}
    tree["checkpoint"] |= checkpoint
    return RunConfig.model_validate(tree)


def identify(sequence_length: int, step: int = 0) -> DataIdentity:
    return DATA if sequence_length == DATA.sequence_length else replace(DATA, fingerprint="0" * 64)


def start_at(run: Path, mesh: ParallelMesh) -> Path | None:
    """Where a start of the run would go on."""
    config = config_of(run)
    start, _ = confirm(agree(lambda: pick_start(config, identify), mesh), config, identify, mesh)
    return start.resume


def seal(path: Path, content: Any) -> None:
    """Write a manifest of that content, with the hash that it should have."""
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps({"format": FORMAT, "content": content, "sha256": sha256}))


def harm(path: Path, data: st.DataObject) -> None:
    """Change what one of the three JSON files of a checkpoint says, and seal it."""
    name = data.draw(st.sampled_from((MANIFEST, TENSORS, STATE)))
    manifest = json.loads((path / MANIFEST).read_bytes())["content"]
    if name == MANIFEST:
        seal(path, mutated(manifest, data))
        return
    (path / name).write_text(json.dumps(mutated(json.loads((path / name).read_bytes()), data)))
    digest = hash_file(path / name)
    manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": digest}
    seal(path, manifest)


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=2000,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_whatever_a_sealed_checkpoint_says_it_is_sound_or_a_sentence(
    data: st.DataObject, run: Path, mesh: ParallelMesh
) -> None:
    folder = run / "checkpoints"
    older, path = folder / folder_name(OLDER), folder / folder_name(NEWER)
    before = {name: (path / name).read_bytes() for name in (MANIFEST, TENSORS, STATE)}
    begin = config_of(run.with_name("another"), init_from=str(path))
    try:
        harm(path, data)
        wrong, newer_format = attempt(lambda: inspect(path))
        sound = wrong == []
        assert all(reason and "\n" not in reason for reason in [*(wrong or ()), newer_format or "-"])
        weights, _ = attempt(lambda: load_weights(path))
        assert (weights is not None) == sound
        start, refusal = attempt(lambda: start_at(run, mesh))
        weights_from, _ = attempt(
            lambda: check_weights(agree(lambda: pick_start(begin, identify), mesh), begin.model, mesh) or True
        )
        if not sound:
            # Only what a newer version may read is no reason to go on from an older checkpoint.
            assert (start, refusal is None) == ((older, True) if newer_format is None else (None, False))
            assert weights_from is None
            return
        assert_meaningful(path)
        saved = read_saved(path)
        same_model, same_data = saved.model == MODEL, saved.data == DATA
        if same_model and same_data:
            assert start == (path if saved.healthy and saved.state.step >= OLDER else older)
        assert weights_from or not same_model
    finally:
        for name, content in before.items():
            (path / name).write_bytes(content)


def attempt(call: Callable[[], T]) -> tuple[T | None, str | None]:
    """What a call returns, or the sentence with which it refuses."""
    try:
        return call(), None
    except UserError as refused:
        return None, str(refused)


def assert_meaningful(path: Path) -> None:
    """What is accepted is a checkpoint: every tensor of its model, finite, each number its own, a possible state."""
    stored, saved = promised(path), read_saved(path)
    assert stored.shapes == expected_shapes(saved.model)
    total = sum(math.prod(shape) for shape in stored.shapes.values())
    assert total * 4 <= sum(file.stat().st_size for file in path.glob("rank_*.bin"))
    for name in stored.shapes:
        numbers = stored.read(name)
        assert np.isfinite(numbers).all()
        assert "exp_avg_sq" not in name or (numbers >= 0).all()
    assert 0 <= saved.state.updates <= saved.state.step <= saved.state.samples * (saved.data.sequence_length or 1)


@pytest.fixture
def path(run: Path, tmp_path: Path) -> Path:
    """The newer of two checkpoints, to be changed."""
    return shutil.copytree(run, tmp_path / "run") / "checkpoints" / folder_name(NEWER)


def table(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the table of tensors."""
    return lambda path: edit(path / TENSORS, lambda content: change(content["tensors"]))


def state(**values: object) -> Callable[[Path], object]:
    return lambda path: edit(path / STATE, lambda content: content["state"].update(values))


def number(name: str, value: float) -> Callable[[Path], object]:
    """Put a number in the place of the first of a tensor."""

    def change(path: Path) -> None:
        place = json.loads((path / TENSORS).read_bytes())["tensors"][name]["chunks"][0]
        content = bytearray((path / place["file"]).read_bytes())
        content[place["start"] : place["start"] + 4] = np.float32(value).tobytes()
        rewrite(path / place["file"], bytes(content))

    return change


def content(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what the manifest says, and its hash."""

    def harm(path: Path) -> None:
        found = json.loads((path / MANIFEST).read_bytes())["content"]
        change(found)
        seal(path, found)

    return harm


def in_a_json(path: Path) -> None:
    """Store a tensor in tensors.json: blanks behind its text are as good as numbers."""
    edit(path / TENSORS, lambda content: content["tensors"]["model.norm.weight"].update(chunks=[IN_JSON]))


def fifo(name: str) -> Callable[[Path], object]:
    return lambda path: ((path / name).unlink(), os.mkfifo(path / name))


def link_out(name: str) -> Callable[[Path], object]:
    """Keep a file outside, and a link to it in its place."""

    def harm(path: Path) -> None:
        (path / name).rename(path.parent.parent / "outside")
        (path / name).symlink_to(path.parent.parent / "outside")

    return harm


IN_JSON = {"offset": [0], "shape": [4], "file": TENSORS, "start": 0}
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
SECOND_MOMENT = f"optimizer.exp_avg_sq.{NORM}"
SENSELESS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no files": (content(lambda tree: tree.pop("files")), "manifest.json is malformed: files"),
    "a negative step": (content(lambda tree: tree.update(step=-1)), "manifest.json is malformed: step is -1"),
    "a step in words": (content(lambda tree: tree.update(step="3")), "manifest.json is malformed: step is '3'"),
    "a hash in words": (
        content(lambda tree: tree["files"][STATE].update(sha256="x")),
        "manifest.json is malformed: files.state.json.sha256 is 'x'",
    ),
    "another file": (
        content(lambda tree: tree["files"].update({MANIFEST: tree["files"][STATE]})),
        "manifest.json names the file 'manifest.json', which is none of a checkpoint",
    ),
    "a nested manifest": (
        lambda path: (path / MANIFEST).write_text("[" * 200_000 + "]" * 200_000),
        "manifest.json is damaged",
    ),
    "a FIFO for a manifest": (fifo(MANIFEST), "manifest.json cannot be read: it is no regular file"),
    "a FIFO for numbers": (fifo("rank_00000.bin"), "rank_00000.bin is no regular file"),
    "a manifest elsewhere": (link_out(MANIFEST), "manifest.json cannot be read"),
    "numbers elsewhere": (link_out("rank_00001.bin"), "rank_00001.bin is no regular file"),
    "a tensor missing": (table(lambda tensors: tensors.pop(NORM)), f"{NORM} is missing"),
    "a tensor with a name for a terminal": (
        table(lambda tensors: tensors.update({"\x1b[31m\n": tensors.pop(NORM)})),
        f"{NORM} is missing",
    ),
    "a tensor more": (
        table(lambda tensors: tensors.update({"\x1b[31m": tensors[NORM]})),
        "tensors.json has byte \\d+ of rank_00000.bin in '.x1b\\[31m' and in model.norm|in model.norm.*x1b",
    ),
    "a tensor without dimensions": (table(lambda tensors: tensors[NORM].update(shape=[])), "shape is \\[\\]"),
    "a tensor of another shape": (
        table(lambda tensors: tensors.update({NORM: tensors[EMBEDDING], EMBEDDING: tensors[NORM]})),
        "has the shape \\[8, 4\\], and in the model \\[4\\]|has the shape \\[4\\], and in the model \\[8, 4\\]",
    ),
    "24 dimensions": (table(lambda tensors: tensors[NORM].update(shape=[2] * 24)), "tensors.json is malformed"),
    "43 dimensions": (
        table(lambda tensors: tensors[NORM].update(shape=[1] * 43, chunks=[{**IN_JSON, "shape": [1] * 43}])),
        "tensors.json is malformed",
    ),
    "8 TiB": (table(lambda tensors: tensors[NORM].update(shape=[2**41])), f"element .* of {NORM} in no chunk"),
    "numbers in a JSON file": (in_a_json, f"tensors.json has numbers of {NORM} in tensors.json"),
    "one place for two tensors": (
        table(lambda tensors: tensors[NORM].update(chunks=tensors["model.layers.0.input_layernorm.weight"]["chunks"])),
        "tensors.json has byte \\d+ of rank_00000.bin in",
    ),
    "a grid of chunks": (
        table(
            lambda tensors: tensors[EMBEDDING].update(
                shape=[100_000, 100_000],
                chunks=[
                    {"offset": [9 * n, 7 * n], "shape": [1, 1], "file": "rank_00000.bin", "start": 0}
                    for n in range(9000)
                ],
            )
        ),
        "blocks by 9000 chunks",
    ),
    "another step": (state(step=2, updates=2), "state.json says step 2, and the manifest 3"),
    "more updates than steps": (state(updates=4), "state.json says 4 updates in 3 steps"),
    "samples of 10^18": (state(samples=10**18), "state.json is malformed: state.samples is 1000000000000000000"),
    "samples of 10^15": (state(samples=10**15), "state.json says 1000000000000000 sequences in 3 steps"),
    "fewer tokens than steps": (state(samples=0), "state.json says 0 sequences in 3 steps"),
    "a loss in words": (state(validation_loss="low"), "state.json is malformed: state.validation_loss is 'low'"),
    "a billion layers": (
        lambda path: edit(path / STATE, lambda content: content["model"].update(num_hidden_layers=10**9)),
        "tensors are missing|num_hidden_layers is 1000000000",
    ),
    "no Llama": (
        lambda path: edit(path / STATE, lambda content: content["model"].update(num_key_value_heads=3)),
        "state.json names no Llama: model.num_key_value_heads=3",
    ),
    "an average of no checkpoint": (
        lambda path: edit(path / STATE, lambda content: content.update(average={"kind": "latest"})),
        "state.json has an average of kind latest of 0 steps",
    ),
    "a nested state": (
        lambda path: rewrite(path / STATE, b"[" * 200_000 + b"]" * 200_000),
        "state.json is malformed",
    ),
    "a weight that is NaN": (number(EMBEDDING, math.nan), f"{EMBEDDING} is not finite in 1 of 32 elements"),
    "a moment that is NaN": (number(SECOND_MOMENT, math.nan), f"{SECOND_MOMENT} is not finite in 1 of 4 elements"),
    "a second moment below zero": (number(SECOND_MOMENT, -1.0), f"{SECOND_MOMENT} is below zero in 1 of 4 elements"),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_a_sealed_checkpoint_that_makes_no_sense_is_told_refused_and_passed_over(
    name: str, path: Path, mesh: ParallelMesh
) -> None:
    change, reason = SENSELESS[name]
    change(path)
    (told,) = inspect(path)
    assert re.search(reason, told), told
    assert told.isprintable()
    with pytest.raises(UserError, match=f"the checkpoint {path} is damaged"):
        load_weights(path)
    assert start_at(path.parent.parent, mesh) == path.with_name(folder_name(OLDER))
    begin = config_of(path.parent.parent.with_name("another"), init_from=str(path))
    with pytest.raises(UserError, match=r"checkpoint\.init_from=.* is (damaged|not a complete checkpoint)"):
        check_weights(agree(lambda: pick_start(begin, identify), mesh), begin.model, mesh)


def test_what_lies_beneath_a_damaged_checkpoint_has_to_be_of_the_same_model(path: Path, mesh: ParallelMesh) -> None:
    state(samples=0)(path)
    older = path.with_name(folder_name(OLDER))
    edit(older / STATE, lambda content: content["model"].update(rope_theta=5e5))
    with pytest.raises(UserError, match=r"model\.rope_theta=10000\.0 differs from 500000\.0"):
        start_at(path.parent.parent, mesh)


@pytest.mark.parametrize("name", ["step_٠٠٠٠٠٠٠٩", "step_1234567890123456", "step_" + "9" * 200, "step_0000009"])
def test_a_folder_with_another_name_is_no_checkpoint(name: str, path: Path, mesh: ParallelMesh) -> None:
    shutil.copytree(path, path.with_name(name))
    assert start_at(path.parent.parent, mesh) == path


def test_the_words_of_a_manifest_reach_no_terminal_raw(path: Path) -> None:
    content(lambda tree: tree["versions"].update(torch="\x1b]0;owned\x07"))(path)
    shown = CliRunner().invoke(app, ["checkpoint", "show", str(path)])
    assert shown.exit_code == 0
    assert "\x1b" not in shown.stdout
    assert "owned" in shown.stdout


def test_write_json_and_seal_agree(path: Path) -> None:
    """What seals a changed manifest here seals an unchanged one as the product does."""
    found = (path / MANIFEST).read_bytes()
    seal(path, json.loads(found)["content"])
    assert json.loads((path / MANIFEST).read_bytes()) == json.loads(found)
    write_json(path / "copy", json.loads(found))
    assert (path / "copy").read_bytes() == found
