"""Models of other programs for tests: transformers' Llamas with random weights, and Meta's files made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from megallama.checkpoint.reading.store import load_weights
from megallama.checkpoint.state import read_saved
from megallama.model.llama import Llama

PLAIN = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20_000.0}},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 32, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 32, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


def random_llama(variant: str = "plain", **changes: Any) -> PreTrainedModel:
    """A Llama of transformers, or a Qwen3, with random weights, norms included."""
    torch.manual_seed(7)
    shape, kind = PLAIN | VARIANTS[variant] | changes, (LlamaForCausalLM, LlamaConfig)
    if variant == "qwen3":
        kind = Qwen3ForCausalLM, Qwen3Config
    model = kind[0](kind[1](**shape, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def save(model: PreTrainedModel, folder: Path, **how: Any) -> Path:
    """The folder that transformers writes."""
    model.save_pretrained(folder, **how)
    return folder


def meta_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights in Meta's names and order of rows, channel by channel."""
    config = model.config
    names = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        theirs = name.removeprefix("model.")
        for ours, meta in names.items():
            theirs = theirs.replace(ours, meta)
        if theirs.endswith(("wq.weight", "wk.weight")):
            head = config.hidden_size // config.num_attention_heads
            source = []
            for first in range(0, len(tensor), head):
                for pair in range(head // 2):
                    source += [first + pair, first + head // 2 + pair]
            tensor = tensor[source]
        state[theirs] = tensor.clone()
    return state


def write_meta_folder(model: PreTrainedModel, folder: Path, files: int, *, cut_vocabulary: bool = False) -> Path:
    """params.json and that many consolidated files, cut as Meta's model parallel layers are."""
    config = model.config
    folder.mkdir()
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size if cut_vocabulary else -1,
        "multiple_of": 16,  # of 2/3 * 4 * 64 = 170
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    (folder / "params.json").write_text(json.dumps(params))
    state = meta_state(model)
    for number in range(files):
        shard = {"rope.freqs": torch.zeros(8)}
        for name, tensor in state.items():
            if tensor.dim() == 1:
                shard[name] = tensor
                continue
            columns = name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok_") and not cut_vocabulary)
            shard[name] = tensor.chunk(files, dim=1 if columns else 0)[number].clone()
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    return folder


def meta_logits(state: dict[str, Tensor], params: dict[str, Any], tokens: Tensor) -> Tensor:
    """Meta's Llama: rotary embedding as products of complex numbers, pairs of neighbouring channels."""
    heads, head = params["n_heads"], params["dim"] // params["n_heads"]
    length = tokens.shape[1]
    angles = torch.outer(
        torch.arange(length).float(), params["rope_theta"] ** -(torch.arange(0, head, 2).float() / head)
    )
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = state["tok_embeddings.weight"][tokens]
    for layer in range(params["n_layers"]):
        w = {name.removeprefix(f"layers.{layer}."): t for name, t in state.items() if f"layers.{layer}." in name}
        y = norm(x, w["attention_norm.weight"])
        q, k, v = ((y @ w[f"attention.{n}.weight"].T).view(*y.shape[:2], -1, head) for n in ("wq", "wk", "wv"))
        q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / head**0.5
        scores += torch.full((length, length), float("-inf")).triu(1)
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        x = x + y @ w["attention.wo.weight"].T
        y = norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(y @ w["feed_forward.w1.weight"].T)
        x = x + (gate * (y @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T


def our_llama(checkpoint: Path) -> Llama:
    """The model of a checkpoint in this process, fp32."""
    model, weights = Llama(read_saved(checkpoint).model), load_weights(checkpoint)
    with torch.no_grad():
        for name, pieces in model.shard_slices.items():
            parameter = model.get_parameter(name).zero_()
            for piece in pieces:
                piece.of(parameter).copy_(weights[piece.name])
    return model.eval()
