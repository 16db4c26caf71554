"""A checkpoint of each format, made once, is read for ever: by training, by generation, by the reader of the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.checkpoint.format import read_document, read_manifest
from megallama.checkpoint.inspect import inspect
from megallama.checkpoint.store import TrainState, load_weights, read_model, read_state
from megallama.checkpoint.tensors import Stored
from megallama.data.tokenizer import load_tokenizer
from megallama.generate import Sampling, generate, load_run
from megallama.parallel.spawn import run_ranks
from megallama.verify.compare import events_of, train_losses
from megallama.verify.verify import train_rank
from tests.checkpoint.damaging import CHECKPOINT, FIXTURE
from tests.checkpoint.make_fixture import EXPECTED, SAVED_AFTER, TEXT, build_text, sha256, tiny_run


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
    assert read_state(CHECKPOINT) == TrainState(3, 12, 3, read_document(CHECKPOINT)["state"]["validation_loss"])


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
    model, tokenizer, path = load_run(tmp_path)
    assert (model.config, path.name) == (read_model(CHECKPOINT), CHECKPOINT.name)
    for name, pieces in model.logical_pieces().items():
        for piece in pieces:
            assert torch.equal(piece.of(model.get_parameter(name)), weights[piece.name]), piece.name
    assert len(generate(model, tokenizer, "Document", 4, Sampling(temperature=0.0))) > len("Document")
