"""The shape of a model as Megatron-LM keeps it: its command line, in `common.pt` of a distributed checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megallama.config.keys import as_typed
from megallama.errors import UserError
from megallama.system.regular_file import open_regular

COMMON = "common.pt"
_FIXED: tuple[tuple[str, Any], ...] = (
    ("position_embedding_type", "rope"),
    ("rotary_interleaved", False),
    ("rotary_percent", 1.0),
    ("no_rope_freq", None),
    ("normalization", "RMSNorm"),
    ("apply_layernorm_1p", False),
    ("apply_residual_connection_post_layernorm", False),
    ("swiglu", True),
    ("glu_linear_offset", 0.0),
    ("activation_func_clamp_value", None),
    ("add_bias_linear", False),
    ("add_qkv_bias", False),
    ("qk_l2_norm", False),
    ("multi_latent_attention", False),
    ("attention_output_gate", False),
    ("softmax_type", "vanilla"),
    ("window_size", None),
    ("num_experts", None),
    ("mtp_num_layers", None),
)
"""What Megatron's GPT can be switched to and a Llama cannot, with the only value taken here."""
_NUMBERS = (
    ("num_attention_heads", "num_attention_heads"),
    ("max_position_embeddings", "max_position_embeddings"),
    ("norm_epsilon", "rms_norm_eps"),
    ("rotary_base", "rope_theta"),
)
_INERT = ("megatron.", "transformer_engine.", "numpy.", "pathlib.", "signal.Signals", "types.SimpleNamespace", "_io.")
"""Beginnings of what Megatron-LM keeps in `common.pt` beside plain values; a stand-in takes the place of each."""


class _StandIn:
    """In the place of an object of Megatron-LM: takes whatever it is made of, and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_args(folder: Path) -> dict[str, Any] | None:
    """The arguments that Megatron-LM keeps in a checkpoint; None if another program saved it, which keeps none.

    UserError if `common.pt` is damaged or holds code.
    """
    path = folder / COMMON
    if not path.exists():
        return None
    try:
        open_regular(path).close()
        foreign = [name for name in get_unsafe_globals_in_checkpoint(path) if name != "argparse.Namespace"]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); copy the checkpoint again") from None
    except Exception:  # torch has no one kind of error for what is damaged
        raise UserError(f"{path} is no whole file of plain values by torch.save; copy the checkpoint again") from None
    for name in sorted(foreign):
        if not name.startswith(_INERT):
            raise UserError(f"{path} holds {name}, which is no plain value, and is not loaded")
    try:
        with safe_globals([argparse.Namespace, *((_StandIn, name) for name in foreign)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # as above
        raise UserError(f"{path} is no whole file of plain values by torch.save; copy the checkpoint again") from None
    args = content.get("args") if isinstance(content, dict) else None
    return vars(args) if isinstance(args, argparse.Namespace) else None


def model_from_args(args: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of `model` that the arguments of Megatron-LM state and tensors do not; `where` begins UserErrors."""
    for key, only in _FIXED:
        if args.get(key, only) != only:
            found, expected = _said(args[key]), as_typed(only)
            raise UserError(f"{where} has {key}={found}, which is not Llama's; expected {key}={expected}")
    model: dict[str, Any] = {ours: _number(args, theirs, where) for theirs, ours in _NUMBERS if theirs in args}
    if args.get("untie_embeddings_and_output_weights") is not None:
        model["tie_word_embeddings"] = not args["untie_embeddings_and_output_weights"]
    if isinstance(args.get("qk_layernorm"), bool):
        model["qk_norm"] = args["qk_layernorm"]
    if args.get("use_rope_scaling"):
        # The other three numbers are constants of Megatron's RotaryEmbedding, and ours.
        model["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0}
        if args.get("rope_scaling_factor") is not None:
            model["rope_scaling"]["factor"] = _number(args, "rope_scaling_factor", where)
    if args.get("rotary_seq_len_interpolation_factor") is not None:
        if "rope_scaling" in model:
            raise UserError(
                f"{where} has both use_rope_scaling and rotary_seq_len_interpolation_factor; a Llama has one of them"
            )
        factor = _number(args, "rotary_seq_len_interpolation_factor", where)
        model["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return model


def _number(args: dict[str, Any], key: str, where: str) -> int | float:
    value = args[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} has {key}={_said(value)}; expected a number")
    return value


def _said(value: object) -> str:
    """The value as it stands in a sentence, whatever it is."""
    return as_typed(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__
