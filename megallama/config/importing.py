"""The shape of a published Llama, from its Hugging Face `config.json` or its Meta `params.json`. Pure."""

from __future__ import annotations

import math
from typing import Any

from megallama.config.keys import as_typed
from megallama.config.values import MOST_WIDTH
from megallama.errors import UserError

Tree = dict[str, Any]

_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)
# What Hugging Face's Llama can be switched to and megallama's cannot, with the only value taken here.
_FIXED: tuple[tuple[str, Any], ...] = (
    ("hidden_act", "silu"),
    ("attention_bias", False),
    ("mlp_bias", False),
    ("use_sliding_window", False),
)
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Hugging Face's names of what a model can be, by `model_type`: qwen3 is a Llama with `qk_norm`."""
_LEFT_OUT: Tree = {"rms_norm_eps": 1e-6}
_LEFT_OUT_OF_QWEN3: Tree = {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768}
"""What transformers takes where a description leaves it out, and our defaults say otherwise."""
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def model_from_foreign(foreign: object, name: str) -> Tree:
    """The keys of `model` that a foreign description states, those only; `name` begins UserErrors."""
    if isinstance(foreign, dict) and "hidden_size" in foreign:
        return model_from_hugging_face(foreign, name)
    if isinstance(foreign, dict) and "dim" in foreign:
        return model_from_meta(foreign, name)
    raise UserError(f"{name} has neither hidden_size nor dim; expected a config.json or a params.json")


def model_from_hugging_face(foreign: Tree, name: str) -> Tree:
    """From `config.json` as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it."""
    kind = foreign.get("model_type", "llama")
    if kind not in list(ARCHITECTURES):  # a list looks for what has no hash as well
        raise UserError(
            f"{name} has model_type={as_typed(kind)}, which is not Llama's; expected model_type=llama, or qwen3"
        )
    for key, only in _FIXED:
        if foreign.get(key, only) != only:
            found, expected = as_typed(foreign[key]), as_typed(only)
            raise UserError(f"{name} has {key}={found}, which is not Llama's; expected {key}={expected}")
    layers = foreign.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}):
        raise UserError(
            f"{name} has layer_types={as_typed(layers)}, which is not Llama's; expected full_attention alone"
        )
    left_out = _LEFT_OUT | (_LEFT_OUT_OF_QWEN3 if kind == "qwen3" else {})
    model = {key: value for key, value in left_out.items() if key not in foreign}
    model |= {"qk_norm": True} if kind == "qwen3" else {}
    model |= {key: foreign[key] for key in _SAME_NAME if foreign.get(key) is not None}
    rope: Tree = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = foreign.get(key)
        if not isinstance(value, dict | None):
            raise UserError(f"{name} has {key}={as_typed(value)}; expected a mapping or null")
        rope |= value or {}
    theta = rope.get("rope_theta", foreign.get("rope_theta"))
    if theta is not None:
        model["rope_theta"] = theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3" and rope.get("original_max_position_embeddings") is None:
        raise UserError(
            f"{name} has rope_type=llama3 without original_max_position_embeddings; add the length that the model was "
            "trained with before, which is 8192 for Llama 3"
        )
    if kind in ("linear", "llama3"):
        model["rope_scaling"] = {"rope_type": kind} | {key: rope[key] for key in _SCALING if rope.get(key) is not None}
    elif kind != "default":
        raise UserError(f"{name} has rope_type={as_typed(kind)}; expected default, linear or llama3")
    return model


def model_from_meta(foreign: Tree, name: str) -> Tree:
    """From `params.json` of Llama 1 to 3.2, by the arithmetic of Meta's `FeedForward`.

    intermediate_size is 2/3 * 4 * dim, times ffn_dim_multiplier, rounded up to multiple_of. use_scaled_rope is what
    Llama 3.1 has, factor 8; where 32 is meant (Llama 3.2), say model.rope_scaling. A vocab_size of -1 (Llama 1 and 2
    take it from the tokenizer) is left out, and so are lengths, which Meta does not write down.
    """
    dim, multiple_of, multiplier = foreign["dim"], foreign.get("multiple_of", 256), foreign.get("ffn_dim_multiplier")
    sizes = [("dim", dim, 1), ("multiple_of", multiple_of, 1)]
    for key, value, least in sizes if multiplier is None else [*sizes, ("ffn_dim_multiplier", multiplier, 0.001)]:
        if not isinstance(value, int | float) or not least <= value <= MOST_WIDTH:
            raise UserError(f"{name} has {key}={as_typed(value)}; expected a number from {least} to {MOST_WIDTH}")
    missing = [key for key in ("n_layers", "n_heads") if key not in foreign]
    if missing:
        raise UserError(f"{name} has no {missing[0]}; expected a Meta params.json")
    model: Tree = {
        "hidden_size": dim,
        "intermediate_size": meta_intermediate_size(dim, multiple_of, multiplier),
        "num_hidden_layers": foreign["n_layers"],
        "num_attention_heads": foreign["n_heads"],
    }
    for theirs, ours in (
        ("n_kv_heads", "num_key_value_heads"),
        ("norm_eps", "rms_norm_eps"),
        ("rope_theta", "rope_theta"),
    ):
        if foreign.get(theirs) is not None:
            model[ours] = foreign[theirs]
    if foreign.get("vocab_size", -1) != -1:
        model["vocab_size"] = foreign["vocab_size"]
    if foreign.get("use_scaled_rope"):
        model["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0}
        model["max_position_embeddings"] = 131072
    return model


def meta_intermediate_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the SwiGLU product in Meta's models, rounding down twice and then up as their code does."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)
