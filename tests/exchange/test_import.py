"""`megallama import`: a run directory from a folder of another program, whole or not at all."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megallama.checkpoint.reading.inspect import inspect
from megallama.checkpoint.reading.store import load_weights
from megallama.checkpoint.state import read_saved
from megallama.cli import app
from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.exchange.incoming import grow, import_folder
from megallama.exchange.new_folder import new_folder
from megallama.generation.load import load_model
from tests.exchange.foreign import VARIANTS, random_llama, save, write_meta_folder
from tests.launching import tree

BYTES = "data.tokenizer=bytes"
STEP_0 = Path("checkpoints") / "step_00000000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_llama(), tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_checkpoint_is_sound_and_has_the_weights_to_the_bit(variant: str, tmp_path: Path) -> None:
    model = random_llama(variant)
    source, out = save(model, tmp_path / "model", max_shard_size="100KB"), tmp_path / "run"
    import_folder(source, out, [BYTES], None, None)
    assert inspect(out / STEP_0) == []
    weights, expected = load_weights(out / STEP_0), dict(model.named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    config = load_config(out / "config.yaml")
    assert config.model == read_saved(out / STEP_0).model
    assert (config.data.tokenizer, config.checkpoint.init_from) == (str(out / "tokenizer"), str(out / STEP_0))


@torch.no_grad()
def test_the_run_directory_generates_with_the_logits_of_the_source(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "run", [BYTES], None, None)
    tokens = torch.arange(100)[None]
    ours = load_model(tmp_path / "run").model
    assert (ours(tokens) - random_llama()(tokens).logits).abs().max() < 1e-4


def test_a_moment_takes_no_place_on_the_disk(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "run", [BYTES], None, None)
    found = (tmp_path / "run" / STEP_0 / "rank_00000.bin").stat()
    assert found.st_blocks * 512 < found.st_size / 2


def test_overrides_are_laid_over_the_config(folder: Path, tmp_path: Path) -> None:
    words = [str(folder), str(tmp_path / "run"), BYTES, "model.max_position_embeddings=64", "parallel.tensor=2"]
    result = CliRunner().invoke(app, ["import", *words, "data.sequence_length=32", "train.steps=3"])
    assert result.exit_code == 0, result.exception
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.model.max_position_embeddings, config.parallel.tensor, config.train.steps) == (64, 2, 3)


def test_new_rows_are_near_the_mean_and_unlike_each_other(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        import_folder(folder, tmp_path / name, [BYTES], 320, None)
    assert load_config(tmp_path / "a" / "config.yaml").model.vocab_size == 320
    assert inspect(tmp_path / "a" / STEP_0) == []
    grown, again, old = load_weights(tmp_path / "a" / STEP_0), load_weights(tmp_path / "b" / STEP_0), random_llama()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before = old.get_parameter(name)
        assert torch.equal(grown[name], again[name])
        assert torch.equal(grown[name][:300], before)
        assert grown[name][300:].unique(dim=0).shape[0] == 20
        assert (grown[name][300:] - before.mean(dim=0)).abs().max() < 0.1 * before.std()
    with pytest.raises(UserError, match="--vocab-size 299 is below the 300 of"):
        import_folder(folder, tmp_path / "c", [BYTES], 299, None)


def test_growing_nothing_changes_nothing() -> None:
    tensor = torch.randn(4, 3)
    assert torch.equal(grow(tensor, 4), tensor)


def test_a_tokenizer_is_needed_and_must_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer.json; name the model's tokenizer with data.tokenizer="):
        import_folder(folder, tmp_path / "run", [], None, None)
    small = save(random_llama(vocab_size=200), tmp_path / "small")
    with pytest.raises(UserError, match=r"has 257 ids, and the model 200; .* --vocab-size 257"):
        import_folder(small, tmp_path / "run", [BYTES], None, None)
    import_folder(small, tmp_path / "run", [BYTES], 257, None)


def test_metas_width_can_be_mended_by_an_override(tmp_path: Path) -> None:
    folder = write_meta_folder(random_llama(), tmp_path / "meta", 2)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"multiple_of": 256}))
    with pytest.raises(UserError, match="gate_proj"):
        import_folder(folder, tmp_path / "run", [BYTES], None, None)
    import_folder(folder, tmp_path / "run", [BYTES, "model.intermediate_size=176"], None, None)


def test_numbers_that_training_cannot_have_are_refused(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(state, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj.weight is not finite in 1 of 11264 elements"):
        import_folder(broken, tmp_path / "run", [BYTES], None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # no file grows longer, as on a full disk
    try:
        with pytest.raises(UserError, match=r"run cannot be made \(File too large"):
            import_folder(folder, tmp_path / "run", [BYTES], None, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over_and_two_do_not_write_at_once(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with new_folder(out), pytest.raises(UserError, match=r"OUT .*run is in use by process"):
        import_folder(folder, out, [BYTES], None, None)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="run exists, and is not written over"):
        import_folder(folder, out, [BYTES], None, None)
    assert tree(tmp_path) == before


def test_a_run_that_would_go_on_is_not_taken_for_a_new_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run-continued" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run-continued holds checkpoints of an earlier run.*; give run\.dir="):
        import_folder(folder, tmp_path / "run", [BYTES], None, None)
    assert not (tmp_path / "run").exists()
    import_folder(folder, tmp_path / "run", [BYTES, f"run.dir={tmp_path}/new"], None, None)


def test_a_checkpoint_is_found_by_a_link_and_outside_of_a_run_said_to_have_no_tokenizer(
    folder: Path, tmp_path: Path
) -> None:
    import_folder(folder, tmp_path / "run", [BYTES], None, None)
    (tmp_path / "link").symlink_to(tmp_path / "run" / STEP_0)
    assert load_model(tmp_path / "link").name == "run"
    shutil.copytree(tmp_path / "run" / STEP_0, tmp_path / "alone" / "deep" / "step_00000000")
    with pytest.raises(UserError, match="is outside of a run, and has no tokenizer there"):
        load_model(tmp_path / "alone" / "deep" / "step_00000000")


def test_a_program_that_is_not_known_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--from llamafile is not known; expected hf"):
        import_folder(folder, tmp_path / "run", [BYTES], None, "llamafile")
    with pytest.raises(UserError, match=r"has no config.json and no params.json"):
        import_folder(tmp_path, tmp_path / "run", [BYTES], None, None)
