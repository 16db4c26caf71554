"""`megallama export`: a checkpoint as the folder of another program, whole or not at all."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from megallama.checkpoint.format import TENSORS, complete_checkpoints
from megallama.checkpoint.reading.store import load_weights
from megallama.checkpoint.state import DataIdentity
from megallama.checkpoint.writing.beginning import write_beginning
from megallama.cli import app
from megallama.config.schema import ModelConfig
from megallama.errors import UserError
from megallama.exchange.incoming import import_folder
from megallama.exchange.outgoing import export
from megallama.formats.folder import open_weights
from megallama.generation.load import load_model
from megallama.layout.counts import weight_shapes
from megallama.text.tokenizer import load_tokenizer
from tests.checkpoint.damaging import flip, rewrite


def checkpoint(run: Path) -> Path:
    return complete_checkpoints(run / "checkpoints")[0]


@pytest.mark.parametrize("form", ["hf", "meta"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_weights_of_a_run_are_exported_to_the_bit(short_run: Path, tmp_path: Path, form: str, dtype: str) -> None:
    result = CliRunner().invoke(
        app, ["export", str(short_run), str(tmp_path / "out"), "--format", form, "--dtype", dtype]
    )
    assert result.exit_code == 0, result.exception
    found = open_weights(tmp_path / "out")
    for name, tensor in load_weights(checkpoint(short_run)).items():
        assert torch.equal(found.read(name), tensor.bfloat16() if dtype == "bf16" else tensor), name


def test_what_goes_with_the_weights(short_run: Path, tmp_path: Path) -> None:
    export(checkpoint(short_run), tmp_path / "out", "hf", "bf16")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "README.md", "tokenizer.json"} < names
    config, generation = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert config["eos_token_id"] == config["bos_token_id"] == generation["eos_token_id"] == 256
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 40 |" in card
    assert f"| tokens | {40 * 4 * 32:,} |" in card
    assert load_file(next((tmp_path / "out").glob("*.safetensors")))["model.norm.weight"].dtype == torch.bfloat16


def test_a_model_with_norms_of_queries_and_keys_is_a_qwen3_and_nothing_of_metas(tmp_path: Path) -> None:
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = ModelConfig.model_validate(sizes | {"num_attention_heads": 4, "qk_norm": True})
    draws, shapes = np.random.default_rng(1), weight_shapes(model)
    path = write_beginning(
        tmp_path / "checkpoints", model, DataIdentity("-", 1), lambda name: draws.random(shapes[name], np.float32)
    )
    export(path, tmp_path / "out", "hf", "fp32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    assert config["use_sliding_window"] is False and "mlp_bias" not in config
    assert "tags: [qwen3, megallama]" in (tmp_path / "out" / "README.md").read_text()
    found, written = open_weights(tmp_path / "out"), load_weights(path)
    assert found.shapes.keys() == written.keys() >= {"model.layers.1.self_attn.k_norm.weight"}
    assert all(torch.equal(found.read(name), tensor) for name, tensor in written.items())
    with pytest.raises(UserError, match=r"params.json knows no model.qk_norm; use --format hf"):
        export(path, tmp_path / "meta", "meta", "fp32")
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_weights_and_tokenizer_come_back_from_an_export(short_run: Path, tmp_path: Path, form: str) -> None:
    export(short_run, tmp_path / "out", form, "fp32")
    import_folder(tmp_path / "out", tmp_path / "run", [], None, None)
    before, after = load_weights(checkpoint(short_run)), load_weights(checkpoint(tmp_path / "run"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    first, second = (load_tokenizer(str(run / "tokenizer")) for run in (short_run, tmp_path / "run"))
    assert first.encode("any text \u00e9\n") == second.encode("any text \u00e9\n")
    assert first.eod_id == second.eod_id


@pytest.mark.parametrize("words", ["run", "run/checkpoints", "run/checkpoints/step_00000040", "link"])
def test_export_and_generate_mean_the_same_by_a_path(short_run: Path, tmp_path: Path, words: str) -> None:
    """Also where the folder of checkpoints is on another disk, and the tokenizer is not beside it."""
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    (tmp_path / "link").symlink_to(run / "checkpoints" / "step_00000040")
    if words == "run":
        (run / "checkpoints").rename(tmp_path / "elsewhere")
        (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    found = load_model(tmp_path / words)
    assert found.source == export(tmp_path / words, tmp_path / "out", "hf", "bf16")
    assert (found.name, found.source.resolve().name) == ("run", "step_00000040")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "README.md").read_text().partition("# ")[2].startswith("run\n")


def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(short_run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint(short_run), tmp_path / "step_00000040")
    flip(path / "rank_00000.bin")
    with pytest.raises(UserError, match=r"is damaged \(rank_00000.bin is damaged\); use another"):
        export(path, tmp_path / "out", "hf", "bf16")
    assert [found.name for found in tmp_path.iterdir()] == ["step_00000040"]


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_numbers_that_bf16_does_not_have_are_refused_and_fp32_holds_them(
    short_run: Path, tmp_path: Path, form: str
) -> None:
    path = shutil.copytree(checkpoint(short_run), tmp_path / "step_00000040")
    (chunk,) = json.loads((path / TENSORS).read_text())["tensors"]["model.norm.weight"]["chunks"]
    numbers = np.fromfile(path / chunk["file"], "<f4")
    numbers[chunk["start"] // 4] = largest = np.finfo(np.float32).min
    rewrite(path / chunk["file"], numbers.tobytes())
    words = [str(path), str(tmp_path / "out"), "--format", form]
    result = CliRunner().invoke(app, ["export", *words])
    sentence = "model.norm.weight has numbers that are too large for bfloat16; use --dtype fp32"
    assert str(result.exception) == sentence
    assert list(tmp_path.iterdir()) == [path]
    assert CliRunner().invoke(app, ["export", *words, "--dtype", "fp32"]).exit_code == 0
    assert open_weights(tmp_path / "out").read("model.norm.weight")[0] == largest


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_a_full_disk_leaves_nothing(short_run: Path, tmp_path: Path, form: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # no file grows longer, as on a full disk
    try:
        with pytest.raises(UserError, match=r"out cannot be made \("):
            export(short_run, tmp_path / "out", form, "fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_slip_of_the_hand_is_refused(short_run: Path, tmp_path: Path) -> None:
    for words, sentence in [
        ((short_run, short_run, "hf", "bf16"), "exists, and is not written over"),
        ((short_run, tmp_path / "out", "gguf", "bf16"), "--format gguf is not known; expected hf or meta"),
        ((short_run, tmp_path / "out", "hf", "fp8"), "--dtype fp8 is not known; expected bf16 or fp32"),
        ((tmp_path, tmp_path / "out", "hf", "bf16"), "holds no checkpoint; give a run directory"),
    ]:
        with pytest.raises(UserError, match=sentence):
            export(*words)
    assert list(tmp_path.iterdir()) == []
