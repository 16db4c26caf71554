"""Folders of Hugging Face's Llamas: read in every form that transformers writes, and refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megallama.errors import UserError
from megallama.formats.folder import open_weights
from megallama.formats.hugging_face import INDEX, HuggingFace, write_hugging_face
from megallama.formats.weights import check_shapes, llama_shapes, model_config
from tests.checkpoint.damaging import Bomb
from tests.exchange.foreign import VARIANTS, random_llama, save

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(random_llama("grouped"), tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    """Names with `__` for dots; None takes a tensor away."""
    state = load_file(folder / SINGLE)
    for name, tensor in changes.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_file(state, folder / SINGLE)


def as_bin(folder: Path, content: object | None = None) -> None:
    torch.save(load_file(folder / SINGLE) if content is None else content, folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def sharded(folder: Path) -> dict[str, str]:
    """The folder in two files; returns the weight_map."""
    state = load_file(folder / SINGLE)
    weight_map = {name: "b.safetensors" if "mlp" in name else "a.safetensors" for name in state}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensor for name, tensor in state.items() if weight_map[name] == file}, folder / file)
    (folder / SINGLE).unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def opened(folder: Path) -> HuggingFace:
    weights = open_weights(folder)
    assert isinstance(weights, HuggingFace)
    check_shapes(weights, model_config(weights.model, str(folder)), str(folder))
    return weights


@pytest.mark.parametrize("how", [lambda folder: None, sharded, as_bin], ids=["single", "sharded", "bin"])
def test_the_same_weights_from_every_kind_of_file(folder: Path, how: Callable[[Path], object]) -> None:
    expected = load_file(folder / SINGLE)
    how(folder)
    weights = opened(folder)
    assert weights.shapes.keys() == expected.keys()
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_come_in_the_type_in_which_they_are_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = opened(save(random_llama().to(dtype), tmp_path / "model"))
    assert {weights.read(name).dtype for name in weights.shapes} == {dtype}


def test_what_a_config_leaves_out_is_as_in_transformers(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    for key in ("rms_norm_eps", "tie_word_embeddings", "rope_parameters"):
        del described[key]
    (folder / "config.json").write_text(json.dumps(described))
    model = model_config(HuggingFace(folder).model, "")
    assert (model.rms_norm_eps, model.tie_word_embeddings, model.rope_theta) == (1e-6, False, 10_000.0)


def test_rows_beyond_the_vocabulary_are_padding_and_left_out(folder: Path) -> None:
    edit_config(folder, vocab_size=290)
    weights = opened(folder)
    whole = load_file(folder / SINGLE)
    for name in (EMBEDDING, HEAD):
        assert torch.equal(weights.read(name), whole[name][:290])


def test_a_tied_head_that_is_written_too_must_be_the_embedding(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"tie_word_embeddings=true, and lm_head.weight that differs"):
        opened(folder)
    edit_weights(folder, lm_head__weight=load_file(folder / SINGLE)[EMBEDDING].clone())
    assert HEAD not in opened(folder).shapes


GATE = "model__layers__1__mlp__gate_proj__weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: edit_weights(f, **{GATE: None}), "has no model.layers.1.mlp.gate_proj.weight"),
    "extra": (lambda f: edit_weights(f, foo__weight=torch.ones(2)), "has foo.weight, which is not of a Llama"),
    "bias": (
        lambda f: edit_weights(f, model__layers__0__self_attn__q_proj__bias=torch.ones(64)),
        "has model.layers.0.self_attn.q_proj.bias, which is not of a Llama",
    ),
    "misshapen": (
        lambda f: edit_weights(f, **{GATE: torch.ones(3, 64)}),
        r"model.layers.1.mlp.gate_proj.weight in the shape \[3, 64\], and the model in \[176, 64\]",
    ),
    "a number": (
        lambda f: [edit_weights(f, lm_head__weight=torch.tensor(1.0)), edit_config(f, tie_word_embeddings=True)],
        "lm_head.weight that differs from",
    ),
    "a list of rope": (lambda f: edit_config(f, rope_parameters=[1]), r"rope_parameters=\[1\]; expected a mapping"),
    "too few rows": (lambda f: edit_config(f, vocab_size=400), r"in the shape \[300, 64\], and the model in \[400, 64"),
    "integers": (lambda f: edit_weights(f, **{GATE: torch.ones(2, dtype=torch.int8)}), "in I8; expected F32"),
    "architecture": (lambda f: edit_config(f, architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
    "model type": (lambda f: edit_config(f, model_type="qwen2"), "model_type=qwen2"),
    "attention bias": (lambda f: edit_config(f, attention_bias=True), "attention_bias=true"),
    "rope type": (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "factor": 2}), "rope_type=yarn"),
    "part of a head": (lambda f: edit_config(f, rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary"),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), "has a quantization_config"),
    "a bad number": (lambda f: edit_config(f, num_hidden_layers="four"), "model.num_hidden_layers=four is not legal"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "not legal JSON"),
    "cut off": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-4]), "is no whole safetensors file"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "has no weights; expected model.safetensors"),
    "code": (lambda f: as_bin(f, {"a": Bomb()}), "is a pickle of more than tensors, and is not loaded"),
    "no dictionary": (lambda f: as_bin(f, [torch.ones(2)]), "holds a list; expected tensors by name"),
    "no tensor": (lambda f: as_bin(f, {"a": 3}), "holds 'a' that is no tensor"),
    "no pickle": (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), "is no whole file of torch.save"),
    "index leaves": (
        lambda f: write_index(f, dict.fromkeys(sharded(f), "../model/a.safetensors")),
        "names the file ../model/a.safetensors, which is not in its folder",
    ),
    "shard gone": (lambda f: (sharded(f), (f / "b.safetensors").unlink()), "b.safetensors cannot be read"),
    "index says more": (
        lambda f: write_index(f, sharded(f) | {"x": "a.safetensors"}),
        f"a.safetensors lacks x, and {INDEX} says otherwise",
    ),
    "index says less": (
        lambda f: write_index(f, {n: at for n, at in sharded(f).items() if n != HEAD}),
        f"a.safetensors has {HEAD}, and {INDEX} says otherwise",
    ),
    "index is empty": (lambda f: (sharded(f), write_index(f, {})), "has no weight_map"),
}


REFUSED_QWEN3: dict[str, tuple[dict[str, Any], str]] = {
    "windows": ({"use_sliding_window": True}, "use_sliding_window=true"),
    "a layer with a window": (
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        r"has layer_types=\[.*which is not Llama's; expected full_attention alone",
    ),
    "no list of layers": ({"layer_types": 3}, "layer_types=3"),
    "biases": ({"attention_bias": True}, "attention_bias=true"),
    "another architecture": (
        {"architectures": ["Qwen3MoeForCausalLM"]},
        r'architectures=\["Qwen3MoeForCausalLM"\]; expected Qwen3ForCausalLM',
    ),
    "called a Llama": (
        {"model_type": "llama", "architectures": None},
        "has model.layers.0.self_attn.k_norm.weight, which is not of a Llama of its description",
    ),
}


@pytest.mark.parametrize("case", REFUSED_QWEN3)
def test_a_qwen3_that_is_no_llama_with_norms_is_refused(tmp_path: Path, case: str) -> None:
    changes, sentence = REFUSED_QWEN3[case]
    folder = save(random_llama("qwen3"), tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=sentence):
        opened(folder)


def test_a_qwen3_without_a_norm_is_refused(tmp_path: Path) -> None:
    folder = save(random_llama("qwen3"), tmp_path / "model")
    edit_weights(folder, model__layers__3__self_attn__q_norm__weight=None)
    with pytest.raises(UserError, match=r"has no model.layers.3.self_attn.q_norm.weight, which a model of its"):
        opened(folder)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_llama_is_refused_by_its_first_offender(folder: Path, case: str, tmp_path: Path) -> None:
    harm, sentence = REFUSED[case]
    harm(folder)
    with pytest.raises(UserError, match=sentence):
        opened(folder)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shard_bytes", [1, 100_000, 10**9])
def test_what_is_written_is_what_was_read(variant: str, shard_bytes: int, tmp_path: Path) -> None:
    weights = opened(save(random_llama(variant), tmp_path / "model"))
    config, out = model_config(weights.model, ""), tmp_path / "out"
    out.mkdir()
    write_hugging_face(weights, config, out, torch.float32, 2, shard_bytes)
    again = opened(out)
    assert model_config(again.model, "") == config
    for name in llama_shapes(config):
        assert torch.equal(again.read(name), weights.read(name)), name
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) == {1: len(index["weight_map"]), 10**9: 1}.get(shard_bytes, len(files))
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= shard_bytes or len(tensors) == 1
