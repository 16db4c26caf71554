"""Folders of Meta's Llamas: put together from any number of files, and held against a forward in Meta's own form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.config.schema import ModelConfig, RopeScaling
from megallama.errors import UserError
from megallama.formats.folder import open_weights
from megallama.formats.meta import Meta, params_json, write_meta
from megallama.formats.weights import check_shapes, model_config
from tests.checkpoint.damaging import Bomb
from tests.exchange.foreign import meta_logits, meta_state, random_llama, save, write_meta_folder

TOKENS = torch.arange(100)[None]


def opened(folder: Path) -> Meta:
    weights = open_weights(folder)
    assert isinstance(weights, Meta)
    check_shapes(weights, model_config(weights.model, str(folder)), str(folder))
    return weights


@pytest.mark.parametrize("cut_vocabulary", [False, True], ids=["llama2", "llama3"])
@pytest.mark.parametrize("files", [1, 2, 4])
def test_files_are_put_together_in_hugging_faces_order(tmp_path: Path, files: int, cut_vocabulary: bool) -> None:
    model = random_llama("grouped")
    weights = opened(write_meta_folder(model, tmp_path / "meta", files, cut_vocabulary=cut_vocabulary))
    state = model.state_dict()
    assert weights.shapes.keys() == state.keys()
    assert weights.model["vocab_size"] == 300
    for name, tensor in state.items():
        assert torch.equal(weights.read(name), tensor), name


@pytest.mark.parametrize("variant", ["plain", "grouped"])
@torch.no_grad()
def test_what_is_written_has_the_same_logits_in_metas_form(variant: str, tmp_path: Path) -> None:
    model = random_llama(variant)
    weights = open_weights(save(model, tmp_path / "model"))
    out = tmp_path / "out"
    out.mkdir()
    write_meta(weights, model_config(weights.model, ""), out, torch.float32)
    assert sorted(path.name for path in out.iterdir()) == ["consolidated.00.pth", "params.json"]
    written = torch.load(out / "consolidated.00.pth", weights_only=True)
    params = json.loads((out / "params.json").read_text())
    expected = model(TOKENS).logits
    assert (meta_logits(written, params, TOKENS) - expected).abs().max() < 1e-4
    unturned = meta_state(model) | {n: t for n, t in model.state_dict().items()}
    for layer in range(4):
        for theirs, ours in (("wq", "q_proj"), ("wk", "k_proj")):
            unturned[f"layers.{layer}.attention.{theirs}.weight"] = unturned[
                f"model.layers.{layer}.self_attn.{ours}.weight"
            ]
    assert (meta_logits(unturned, params, TOKENS) - expected).abs().max() > 1e-2  # the comparison sees the order
    again = opened(out)
    assert all(torch.equal(again.read(name), weights.read(name)) for name in weights.shapes)


def test_a_head_that_is_the_embedding_is_tied_and_written_again(tmp_path: Path) -> None:
    weights = opened(write_meta_folder(random_llama("tied"), tmp_path / "meta", 2))
    assert weights.model["tie_word_embeddings"]
    assert "lm_head.weight" not in weights.shapes
    out = tmp_path / "out"
    out.mkdir()
    write_meta(weights, model_config(weights.model, ""), out, torch.bfloat16)
    written = torch.load(out / "consolidated.00.pth", weights_only=True)
    assert torch.equal(written["output.weight"], weights.read("model.embed_tokens.weight").bfloat16())


def edit(folder: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / f"consolidated.{number:02d}.pth"
    state = torch.load(path)
    change(state)
    torch.save(state, path)


def edit_params(folder: Path, **changes: Any) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda f: (f / "consolidated.00.pth").unlink(), "has no consolidated.00.pth; complete the folder"),
    "a tensor": (lambda f: edit(f, 1, lambda s: s.pop("norm.weight")), "consolidated.01.pth has no norm.weight"),
    "of both": (
        lambda f: [edit(f, n, lambda s: s.pop("layers.0.attention.wq.weight")) for n in (0, 1)],
        "has no model.layers.0.self_attn.q_proj.weight",
    ),
    "unequal": (
        lambda f: edit(f, 1, lambda s: s.update({"norm.weight": torch.ones(3)})),
        "norm.weight in unequal parts",
    ),
    "no rows": (
        lambda f: [edit(f, n, lambda s: s.update({"tok_embeddings.weight": torch.ones(0, 64)})) for n in (0, 1)],
        r"tok_embeddings.weight in the shape \[0, 64\]",
    ),
    "a number": (
        lambda f: [edit(f, n, lambda s: s.update({"tok_embeddings.weight": torch.tensor(1.0)})) for n in (0, 1)],
        r"tok_embeddings.weight in the shape \[\]",
    ),
    "extra": (lambda f: [edit(f, n, lambda s: s.update(x=torch.ones(3))) for n in (0, 1)], "has x, which is not of a"),
    "code": (lambda f: edit(f, 1, lambda s: s.update(x=Bomb())), "is a pickle of more than tensors"),
    "width": (
        lambda f: edit_params(f, multiple_of=256),
        r"gate_proj.weight in the shape \[176, 64\], and the model in",
    ),
    "experts": (lambda f: edit_params(f, moe_args={"num_experts": 8}), "has moe_args="),
    "of Mistral": (lambda f: edit_params(f, sliding_window=4096), "has sliding_window=4096, which no Llama"),
    "no layers": (lambda f: edit_params(f, n_layers=None), "model.num_hidden_layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_llama_is_refused_by_its_first_offender(tmp_path: Path, case: str) -> None:
    folder = write_meta_folder(random_llama(), tmp_path / "meta", 2)
    harm, sentence = REFUSED[case]
    harm(folder)
    with pytest.raises(UserError, match=sentence):
        opened(folder)
    assert not Path("exploded").exists()


MODEL = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 7, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("width", [7, 169, 170, 171, 256, 5000])
def test_any_width_can_be_said(width: int, tmp_path: Path) -> None:
    from megallama.config.importing import model_from_meta

    params = params_json(ModelConfig(**MODEL | {"intermediate_size": width}))
    assert model_from_meta(params, "")["intermediate_size"] == width


def test_what_metas_code_cannot_build_is_refused() -> None:
    with pytest.raises(UserError, match=r"knows no model\.rope_scaling of linear by 2"):
        params_json(ModelConfig(**MODEL, rope_scaling=RopeScaling(rope_type="linear", factor=2)))
    with pytest.raises(UserError, match=r"knows no model\.head_dim=8"):
        params_json(ModelConfig(**MODEL, head_dim=8))
    assert params_json(ModelConfig(**MODEL, rope_scaling=RopeScaling(rope_type="llama3", factor=8)))["use_scaled_rope"]
