"""`megallama import --from megatron`: a run directory from a checkpoint of megatron-core's, whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megallama.checkpoint.reading.inspect import inspect
from megallama.checkpoint.reading.store import load_weights
from megallama.cli import main
from megallama.config.load import load_config
from tests.formats.test_megatron import ARGS, Code, hugging_face, megatron, save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # when torch writes the source
STEP_0 = Path("checkpoints") / "step_00000000"
ASKED = ["model.num_attention_heads=4", "model.max_position_embeddings=64", "model.rms_norm_eps=1e-6"]


@pytest.fixture
def run_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """The command with these overrides, to its exit code. The vocabulary grows to that of the tokenizer of bytes."""

    def run(*words: str) -> object:
        command = ["import", "--from", "megatron", "--vocab-size", "257", str(tmp_path / "source")]
        monkeypatch.setattr(sys, "argv", ["megallama", *command, str(tmp_path / "run"), "data.tokenizer=bytes", *words])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code

    return run


@pytest.mark.parametrize("said", ["args", "overrides"])
def test_the_checkpoint_is_sound_and_has_the_weights(
    said: str, run_import: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "source", megatron(), ARGS if said == "args" else None)
    words = [*ASKED, "model.rope_theta=500"] if said == "overrides" else []
    assert run_import("model.vocab_size=13", *words) == 0
    assert "parameters, stored in float32, from" in capsys.readouterr().out
    assert inspect(tmp_path / "run" / STEP_0) == []
    weights = load_weights(tmp_path / "run" / STEP_0)
    for name, tensor in hugging_face().items():
        assert torch.equal(weights[name][: len(tensor)], tensor)
    model = load_config(tmp_path / "run" / "config.yaml").model
    assert (model.rope_theta, model.max_position_embeddings, model.vocab_size) == (500, 64, 257)


def test_what_is_missing_or_hostile_is_one_sentence_and_nothing_written(
    run_import: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = save(tmp_path / "source", megatron())
    before = sorted(tmp_path.iterdir())
    assert run_import(*ASKED) == 2
    assert capsys.readouterr().err.endswith("does not tell rope_theta; give model.rope_theta=...\n")
    torch.save({"args": Code(tmp_path / "made")}, found / "common.pt")
    assert run_import(*ASKED) == 2
    said = capsys.readouterr().err
    assert said == f"megallama: {found}/common.pt holds posix.system, which is no plain value, and is not loaded\n"
    assert sorted(tmp_path.iterdir()) == before
