"""The folder of a Llama as Meta publishes it: `params.json`, and weights in `consolidated.NN.pth`.

Meta's rotary embedding turns neighbouring channels of a head, (0, 1), (2, 3), ..., and Hugging Face's turns channel i
with channel i + head_dim / 2: the rows of the query and key matrices are in another order, head by head.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.config.importing import meta_intermediate_size, model_from_meta
from megallama.config.keys import as_typed
from megallama.config.load import parse_json, read_text
from megallama.config.schema import ModelConfig
from megallama.errors import UserError
from megallama.formats.hugging_face import pieces
from megallama.formats.pickled import read_pickled
from megallama.formats.weights import Weights, llama_shapes, model_config

PARAMS = "params.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_THEIRS = {
    "embed_tokens": "tok_embeddings",
    "norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
_CUT_IN_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
"""What Meta's RowParallelLinear cuts along the input; every other matrix is cut along the output."""
_KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"),
    *("rope_theta", "use_scaled_rope", "max_batch_size", "max_seq_len"),
}
"""The keys of params.json of Llama 1 to 3.2; others make another model of it."""
_SCALED_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Meta:
    """The weights of Meta's folder at `folder`, of any number of files; `Weights`.

    UserError if it is of another architecture, or its files are damaged or do not belong together. A head that equals
    the embedding is tied.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = [read_pickled(path) for path in _consolidated(folder)]
        if (shape := self._parts("tok_embeddings.weight")[0].shape).numel() == 0 or len(shape) != 2:
            raise UserError(f"{folder} has tok_embeddings.weight in the shape {list(shape)}; give those of a Llama")
        described = _described(folder / PARAMS)
        self.model: dict[str, Any] = model_from_meta(described, str(folder / PARAMS))
        if "vocab_size" not in self.model:
            self.model["vocab_size"] = len(self._whole("tok_embeddings.weight"))
        self.model["tie_word_embeddings"] = self._is_tied()
        self._config = model_config(self.model, str(folder / PARAMS))
        named = {meta_name(name): name for name in llama_shapes(self._config)}
        left_out = {"rope.freqs", "output.weight"} - named.keys()
        self._shapes = {named.get(name, name): self._shape(name) for name in self._files[0] if name not in left_out}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every weight, put together from all files."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """One weight, put together from all files and in Hugging Face's order of rows."""
        tensor = self._whole(meta_name(name))
        if name in (_EMBEDDING, _HEAD):
            return tensor[: self._config.vocab_size]
        heads = _rotated_heads(name, self._config)
        return tensor if heads is None else _halves_from_pairs(tensor, heads)

    def _whole(self, name: str) -> Tensor:
        parts = self._parts(name)
        if len(parts) == 1 or parts[0].dim() < 2:
            return parts[0]
        return torch.cat(parts, dim=self._cut(name, parts[0]))

    def _shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts(name)
        shape = list(parts[0].shape)
        if len(shape) == 2:
            cut = self._cut(name, parts[0])
            shape[cut] = sum(part.shape[cut] for part in parts)
        if name in ("tok_embeddings.weight", "output.weight"):
            shape[0] = min(shape[0], self._config.vocab_size)
        return tuple(shape)

    def _cut(self, name: str, part: Tensor) -> int:
        """The dimension along which the parts of a matrix follow each other.

        Llama 1 and 2 cut the embedding along its width, Llama 3 along the vocabulary.
        """
        if name == "tok_embeddings.weight":
            return 0 if part.shape[1] == self.model["hidden_size"] else 1
        return 1 if name.endswith(_CUT_IN_COLUMNS) else 0

    def _parts(self, name: str) -> list[Tensor]:
        """What every file has of a tensor. UserError where one has none, or of a width that does not go together."""
        missing = [number for number, file in enumerate(self._files) if name not in file]
        if missing:
            raise UserError(f"{self._folder}/consolidated.{missing[0]:02d}.pth has no {name}; complete the folder")
        parts = [file[name] for file in self._files]
        if len({part.shape for part in parts}) > 1:
            raise UserError(f"{self._folder} has {name} in unequal parts; give the files of one model")
        return parts

    def _is_tied(self) -> bool:
        """Whether there is no head beside the embedding: Llama 3.2 writes the embedding twice."""
        if any("output.weight" not in file for file in self._files):
            return True
        embedding, head = self._whole("tok_embeddings.weight"), self._whole("output.weight")
        return embedding.shape == head.shape and torch.equal(embedding[0], head[0]) and torch.equal(embedding, head)


def meta_name(name: str) -> str:
    """Meta's name of a weight: `layers.0.attention.wq.weight` for `model.layers.0.self_attn.q_proj.weight`."""
    module = name.removeprefix("model.").removesuffix(".weight")
    prefix = ""
    if module.startswith("layers."):
        _, number, module = module.split(".", 2)
        prefix = f"layers.{number}."
    return f"{prefix}{_THEIRS[module]}.weight"


def _described(path: Path) -> dict[str, Any]:
    described = parse_json(read_text(path), str(path))
    if not isinstance(described, dict) or "dim" not in described:
        raise UserError(f"{path} has no dim; expected the params.json of a Llama")
    for key, value in described.items():
        if key not in _KNOWN and value not in (None, -1):
            raise UserError(
                f"{path} has {key}={as_typed(value)}, which no Llama 1 to 3.2 of text has; give one of those"
            )
    return described


def _consolidated(folder: Path) -> list[Path]:
    """The files of the folder, in their order. UserError if one is missing."""
    found = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    expected = [folder / f"consolidated.{number:02d}.pth" for number in range(max(1, len(found)))]
    for path in expected:
        if path not in found:
            raise UserError(f"{folder} has no {path.name}; complete the folder")
    return found


def write_meta(weights: Weights, config: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write `params.json` and `consolidated.00.pth` into `folder`.

    Each tensor is written to a file of its own, which torch.save then copies from: no more than one is in memory.
    UserError for a model that Meta's code cannot be told to build and for numbers too large for `dtype`, OSError if the
    disk is full.
    """
    params = params_json(config)
    head = [_HEAD] if config.tie_word_embeddings else []  # Meta's code has one in any case
    content: dict[str, Tensor] = {}
    for name in [*llama_shapes(config), *head]:
        tensor = weights.read(_EMBEDDING if name in head else name)
        heads = _rotated_heads(name, config)
        ordered = tensor if heads is None else _pairs_from_halves(tensor, heads)
        content[meta_name(name)] = _on_disk(name, ordered, folder / f"{meta_name(name)}.raw", dtype)
    with (folder / "consolidated.00.pth").open("xb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of its writer, where the file did not take all
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name) from error
    for raw in folder.glob("*.raw"):
        raw.unlink()
    (folder / PARAMS).write_text(json.dumps(params, indent=2) + "\n")


def params_json(config: ModelConfig) -> dict[str, Any]:
    """What describes the model to Meta's code. UserError if nothing does."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.model_dump() != {"rope_type": "llama3", **_SCALED_ROPE}:
        raise UserError(
            f"params.json knows no model.rope_scaling of {scaling.rope_type} by {scaling.factor:g}, only that of "
            "Llama 3.1; use --format hf"
        )
    if config.head_size * config.num_attention_heads != config.hidden_size:
        raise UserError(f"params.json knows no model.head_dim={config.head_size}; use --format hf")
    if config.qk_norm:
        raise UserError("params.json knows no model.qk_norm; use --format hf")
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
        **_width(config.hidden_size, config.intermediate_size),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": scaling is not None,
    }


def _width(dim: int, intermediate_size: int) -> dict[str, Any]:
    """multiple_of and ffn_dim_multiplier that make Meta's FeedForward that wide: the published ones if they do."""
    for multiple_of, multiplier in ((256, None), (1024, 1.3), (4096, 1.3), (256, 1.5)):
        if meta_intermediate_size(dim, multiple_of, multiplier) == intermediate_size:
            found = {"multiple_of": multiple_of}
            return found if multiplier is None else found | {"ffn_dim_multiplier": multiplier}
    # Half a channel more: the product is rounded down.
    return {"multiple_of": 1, "ffn_dim_multiplier": (intermediate_size + 0.5) / meta_intermediate_size(dim, 1, None)}


def _rotated_heads(name: str, config: ModelConfig) -> int | None:
    """Heads of a matrix whose rows Meta has in another order; None for all others."""
    if name.endswith("self_attn.q_proj.weight"):
        return config.num_attention_heads
    return config.kv_heads if name.endswith("self_attn.k_proj.weight") else None


def _halves_from_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads * (pairs, 2)] as [heads * (2, pairs)]."""
    rows, width = tensor.shape
    return tensor.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _pairs_from_halves(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `_halves_from_pairs`."""
    rows, width = tensor.shape
    return tensor.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def _on_disk(name: str, tensor: Tensor, path: Path, dtype: torch.dtype) -> Tensor:
    """The tensor as `dtype`, written to `path` and mapped from there."""
    with path.open("xb") as file:
        for piece in pieces(name, tensor, dtype):
            file.write(piece)
    return torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=dtype).view(tensor.shape)
