"""The shapes of published models, from the files that are published with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megallama.config.importing import meta_intermediate_size
from megallama.config.load import load_config
from megallama.config.schema import ModelConfig, RopeScaling
from megallama.errors import UserError

LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
HUGGING_FACE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
VERSION_4 = {**HUGGING_FACE, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
VERSION_5 = {**HUGGING_FACE, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}}
META = {
    "dim": 4096,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
    "n_heads": 32,
    "n_kv_heads": 8,
    "n_layers": 32,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vocab_size": 128256,
}
LLAMA_31_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(rope_type="llama3", factor=8.0),
)


def imported(folder: Path, foreign: object, beside: str = "", overrides: tuple[str, ...] = ()) -> ModelConfig:
    (folder / "foreign.json").write_text(json.dumps(foreign))
    (folder / "run.yaml").write_text(f"model: {{import: foreign.json{beside}}}\ndata: {{path: x}}\n")
    return load_config(folder / "run.yaml", overrides).model


@pytest.mark.parametrize("foreign", [VERSION_4, VERSION_5, META], ids=["transformers4", "transformers5", "meta"])
def test_llama_31_8b_is_the_same_model_from_each_publisher(tmp_path: Path, foreign: dict[str, Any]) -> None:
    assert imported(tmp_path, foreign) == LLAMA_31_8B


def test_keys_beside_the_import_win_and_overrides_win_over_them(tmp_path: Path) -> None:
    model = imported(tmp_path, META, ", num_hidden_layers: 4, vocab_size: 32000", ("model.vocab_size=100",))
    assert (model.num_hidden_layers, model.vocab_size, model.hidden_size) == (4, 100, 4096)


def test_an_import_may_be_an_override(tmp_path: Path) -> None:
    (tmp_path / "foreign.json").write_text(json.dumps(VERSION_4))
    (tmp_path / "run.yaml").write_text("data: {path: x}\n")
    assert load_config(tmp_path / "run.yaml", ["model.import=foreign.json"]).model == LLAMA_31_8B


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),
        (4096, 1024, 1.3, 14336),
        (16384, 4096, 1.2, 53248),
        (2048, 256, 1.5, 8192),
        (288, 32, None, 768),
    ],
)
def test_metas_arithmetic_gives_the_published_widths(
    dim: int, multiple_of: int, multiplier: float | None, width: int
) -> None:
    assert meta_intermediate_size(dim, multiple_of, multiplier) == width


def test_a_qwen3_is_a_llama_with_norms_and_transformers_defaults(tmp_path: Path) -> None:
    published = {**HUGGING_FACE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64}
    given = {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 32}
    model = imported(tmp_path, published | given | {"rope_theta": 1000000})
    assert (model.qk_norm, model.head_size, model.kv_heads) == (True, 64, 8)
    for key in ("head_dim", "num_key_value_heads", "max_position_embeddings"):
        del published[key]
    model = imported(tmp_path, published)
    assert (model.head_dim, model.num_key_value_heads, model.max_position_embeddings) == (128, 32, 32768)
    assert not imported(tmp_path, HUGGING_FACE).qk_norm


def test_an_eps_that_is_left_out_is_that_of_transformers(tmp_path: Path) -> None:
    for kind in ("llama", "qwen3"):
        left_out = {key: value for key, value in HUGGING_FACE.items() if key != "rms_norm_eps"}
        assert imported(tmp_path, left_out | {"model_type": kind}).rms_norm_eps == 1e-6


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, None, {"type": "linear", "factor": 2.0}])
def test_plain_and_linear_rope_of_transformers_4(tmp_path: Path, rope: dict[str, Any] | None) -> None:
    model = imported(tmp_path, {**HUGGING_FACE, "rope_scaling": rope})
    linear = rope is not None and "factor" in rope
    assert model.rope_scaling == (RopeScaling(rope_type="linear", factor=2.0) if linear else None)
    assert model.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("foreign", "sentence"),
    [
        ({**HUGGING_FACE, "model_type": "mistral"}, "has model_type=mistral, which is not Llama's; expected"),
        ({**HUGGING_FACE, "attention_bias": True}, "has attention_bias=true"),
        ({**HUGGING_FACE, "hidden_act": "gelu"}, "has hidden_act=gelu"),
        ({**HUGGING_FACE, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, "without original_max_position"),
        ({**HUGGING_FACE, "rope_scaling": {"type": "yarn"}}, "has rope_type=yarn; expected default, linear or llama3"),
        ({**HUGGING_FACE, "hidden_size": "wide"}, "model.hidden_size=wide is not legal; expected a whole number"),
        ({**META, "vocab_size": -1}, "model.vocab_size is missing; "),
        ({**META, "multiple_of": 0}, "has multiple_of=0; expected a number from 1 to 10000000"),
        ({key: META[key] for key in ("dim", "n_heads")}, "has no n_layers"),
        ({**HUGGING_FACE, "rope_scaling": "abc"}, "has rope_scaling=abc; expected a mapping or null"),
        ({**HUGGING_FACE, "rope_parameters": [1]}, "has rope_parameters=[1]; expected a mapping or null"),
        ({**META, "ffn_dim_multiplier": float("nan")}, "has ffn_dim_multiplier=NaN; expected a number from 0.001 to"),
        ({}, "has neither hidden_size nor dim"),
        ([1], "has neither hidden_size nor dim"),
    ],
)
def test_what_is_no_llama_is_refused_by_name(tmp_path: Path, foreign: object, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        imported(tmp_path, foreign)
    assert sentence in str(error.value)


def test_an_import_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign.json").write_text("{")
    (tmp_path / "run.yaml").write_text("model: {import: foreign.json}\ndata: {path: x}\n")
    with pytest.raises(UserError, match=r"model.import=foreign.json: not legal JSON"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("model: {import: foreing.json}\ndata: {path: x}\n")
    with pytest.raises(UserError, match=r"there is no file .*foreing.json; did you mean .*foreign.json\?"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("model: {import: 3}\ndata: {path: x}\n")
    with pytest.raises(UserError, match=r"model.import=3 is not legal"):
        load_config(tmp_path / "run.yaml")
