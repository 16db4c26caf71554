"""A checkpoint of each format, made once, is read for ever: by training, by generation, by the reader of the page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.checkpoint.format import FORMAT, MANIFEST, STATE, TENSORS, read_document, read_manifest
from megallama.checkpoint.reading.inspect import inspect
from megallama.checkpoint.reading.store import load_weights
from megallama.checkpoint.state import TrainState, read_saved
from megallama.checkpoint.tensors import Stored
from megallama.generation.generate import generate
from megallama.generation.load import load_model
from megallama.generation.sampling import Sampling
from megallama.layout.counts import weight_shapes
from megallama.parallel.spawn import run_ranks
from megallama.text.tokenizer import load_tokenizer
from megallama.verify.compare import events_of, train_losses
from megallama.verify.verify import train_rank
from tests.checkpoint.damaging import CHECKPOINT, FIXTURE, edit_manifest, flip
from tests.checkpoint.make_fixture import EXPECTED, SAVED_AFTER, TEXT, build_text, sha256, tiny_run

LATER_KEYS = {
    "healthy",
    "state.first_batch",
    "data.sequence_length",
    "objective",
    "layout.context",
    "layout.context_mode",
    *(
        f"state.{key}"
        for key in ("last_batch", "skipped", "skipped_samples", "rewinds", "passed_over", "losses", "norms")
    ),
}
PAGE = Path(__file__).parents[2] / "docs" / "checkpoint-format.md"


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FIXTURE / EXPECTED).read_text())
    return content


def test_the_fixture_is_sound_and_of_several_ranks_that_share_tensors() -> None:
    assert inspect(CHECKPOINT) == []
    assert len([name for name in read_manifest(CHECKPOINT).files if name.startswith("rank_")]) == 4
    stored = Stored(CHECKPOINT)
    assert max(len(stored.places(name)) for name in stored.shapes) == 4


def test_the_fixture_is_read_to_the_bit(expected: dict[str, Any]) -> None:
    stored = Stored(CHECKPOINT)
    assert {name: sha256(stored.read(name)) for name in stored.shapes} == expected["tensors"]
    assert read_saved(CHECKPOINT).state == TrainState(3, 12, 3, read_document(CHECKPOINT)["state"]["validation_loss"])


def test_a_run_in_one_process_continues_the_fixture(expected: dict[str, Any], tmp_path: Path) -> None:
    dataset = build_text(FIXTURE / TEXT, tmp_path)
    run = tmp_path / "run"
    shutil.copytree(CHECKPOINT, run / "checkpoints" / CHECKPOINT.name)
    model = read_document(CHECKPOINT)["model"]
    run_ranks(train_rank, 1, tiny_run(run, dataset, model, "zero1", SAVED_AFTER + 1), None)
    assert [event["step"] for event in events_of(run, "resume")] == [SAVED_AFTER]
    assert train_losses(run) == [pytest.approx(expected["next_loss"], rel=1e-6)]


def test_text_is_generated_with_the_weights_of_the_fixture(expected: dict[str, Any], tmp_path: Path) -> None:
    weights = load_weights(CHECKPOINT)
    hashes = {name: value for name, value in expected["tensors"].items() if not name.startswith("optimizer.")}
    assert {name: sha256(tensor.numpy()) for name, tensor in weights.items()} == hashes
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoints" / CHECKPOINT.name)
    (tmp_path / "config.yaml").touch()
    load_tokenizer("bytes").save(tmp_path / "tokenizer")
    loaded = load_model(tmp_path)
    model = loaded.model
    assert (model.config, loaded.source.name) == (read_saved(CHECKPOINT).model, CHECKPOINT.name)
    for name, pieces in model.shard_slices.items():
        for piece in pieces:
            assert torch.equal(piece.of(model.get_parameter(name)), weights[piece.name]), piece.name
    assert len(generate(loaded, "Document", 4, Sampling(temperature=0.0))) > len("Document")


def reader_of_the_page() -> Callable[[Path], dict[str, Any]]:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    space: dict[str, Any] = {}
    exec(compile(block, PAGE.name, "exec"), space)
    reader: Callable[[Path], dict[str, Any]] = space["read_checkpoint"]
    return reader


def test_the_reader_of_the_page_reads_a_checkpoint_and_finds_damage(expected: dict[str, Any], tmp_path: Path) -> None:
    read = reader_of_the_page()
    assert {name: sha256(tensor) for name, tensor in read(CHECKPOINT).items()} == expected["tensors"]
    copy = shutil.copytree(CHECKPOINT, tmp_path / CHECKPOINT.name)
    flip(copy / "rank_00002.bin")
    with pytest.raises(AssertionError, match=r"rank_00002.bin is damaged"):
        read(copy)
    edit_manifest(copy, lambda tree: tree.update(format=2))
    with pytest.raises(AssertionError, match="format 2 is not 1"):
        read(copy)


def test_the_page_tells_every_key_of_a_checkpoint() -> None:
    """And the number of the format that it is about is the one that is written."""
    page = PAGE.read_text()
    assert page.startswith(f"# The checkpoint format\n\nFormat {FORMAT}. ")
    document = read_document(CHECKPOINT)
    nested = {f"{section}.{key}" for section in ("state", "data") for key in document[section]}
    manifest = json.loads((CHECKPOINT / MANIFEST).read_bytes())
    content = manifest["content"].keys() | manifest.keys() | {"bytes"}
    later = {key.removeprefix("layout.") for key in LATER_KEYS}
    for key in {"loss", "model", *later, *nested, *document["layout"]}:
        assert f"`{key}`" in page, key
    for key in content | {"dtype", "tensors", "chunks", "offset", "shape", "file", "start"}:
        assert f'"{key}"' in page or f"`{key}`" in page, key
    for name, shape in weight_shapes(read_saved(CHECKPOINT).model).items():
        general, projection = re.sub(r"\d+", "N", name), name.split(".")[-2]
        (row,) = [line for line in page.splitlines() if f"`{general}`" in line or f"`{projection}` |" in line]
        assert len(row.split("|")[2].split(";")[0].split(",")) == len(shape), row


def test_a_run_of_today_writes_the_keys_of_the_fixture(tmp_path: Path) -> None:
    """And those that came later, without which a checkpoint can be read; any other needs a new number."""
    dataset = build_text(FIXTURE / TEXT, tmp_path)
    run = tmp_path / "run"
    run_ranks(train_rank, 1, tiny_run(run, dataset, read_document(CHECKPOINT)["model"], "zero1", 1), None)
    today = run / "checkpoints" / "step_00000001"
    assert read_manifest(CHECKPOINT).versions.keys() == read_manifest(today).versions.keys()
    for name in (STATE, MANIFEST, TENSORS):
        first, now = (keys(json.loads((path / name).read_bytes())) for path in (CHECKPOINT, today))
        assert first <= now
        assert now - first == (LATER_KEYS if name == STATE else set())


def keys(tree: Any) -> set[str]:
    """The names of all values in a JSON document, those of files left out."""
    if isinstance(tree, list):
        return set().union(*map(keys, tree))
    if not isinstance(tree, dict):
        return set()
    named = {key for key in tree if not key.startswith("rank_")}
    return named | {f"{key}.{below}" for key in named for below in keys(tree[key])} | keys(tree.get("rank_00000.bin"))
