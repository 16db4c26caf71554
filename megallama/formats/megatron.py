"""Llama-shaped GPT models in the distributed checkpoints of megatron-core (`torch_dist`).

Megatron fuses the query, key and value matrices group by group (the query heads of a group, then its key, then its
value), and gate and up one after the other. It keeps a weight of all layers as one tensor with the layers in front, or
each layer's on its own. Its rotary embedding turns channel i with channel i + head_dim / 2, as Hugging Face's does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.config.keys import as_typed
from megallama.config.load import read_text
from megallama.config.schema import ModelConfig
from megallama.errors import UserError
from megallama.formats.megatron_args import COMMON, model_from_args, read_args
from megallama.formats.torch_dist import METADATA, TorchDist
from megallama.formats.weights import llama_shapes, model_config

LATEST = "latest_checkpointed_iteration.txt"
_EMBEDDING, _NORM, _HEAD = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"
_QKV, _O_PROJ = "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
_Q_NORM, _K_NORM = "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"
_FC1, _FC2 = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
_OUTSIDE = {"model.embed_tokens.weight": _EMBEDDING, "model.norm.weight": _NORM, "lm_head.weight": _HEAD}
# Norms have the first name in transformer-engine's layers and the second in Megatron's own; gate and up are in one
# tensor, or in two with `singleton_local_shards`.
_IN_LAYER = {
    "input_layernorm": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "self_attn.q_proj": (_QKV,),
    "self_attn.k_proj": (_QKV,),
    "self_attn.v_proj": (_QKV,),
    "self_attn.o_proj": (_O_PROJ,),
    "self_attn.q_norm": (_Q_NORM,),
    "self_attn.k_norm": (_K_NORM,),
    "post_attention_layernorm": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "mlp.gate_proj": (_FC1, f"{_FC1}_w"),
    "mlp.up_proj": (_FC1, f"{_FC1}_v"),
    "mlp.down_proj": (_FC2,),
}
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.(?:state\.(?:fp32_)?param\.(.+))?")
"""Of the optimizer's tensors the masters end in the key of their weight: after fp32_param, or param if reshardable."""
_ASKED = ("num_attention_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")
"""What tensors do not tell."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Box:
    """Where a weight is: a box of a tensor, of which q, k and v are then picked."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


class Megatron:
    """The weights of the checkpoint, or of the newest one of the run, in `folder`; `Weights`.

    `told` has keys of `model` that the user gives: needed where the checkpoint has no arguments of Megatron-LM, and for
    a vocab_size without the padding, whose rows are then left out. fp32 masters of the optimizer are read in the place
    of the weights that they are of, where they are stored in the shapes of the model. UserError if the files are
    damaged, hold code, or are of a model that no Llama is.
    """

    def __init__(self, folder: Path, told: Mapping[str, Any] | None = None) -> None:
        self._folder = _checkpoint(folder)
        self._stored = TorchDist(self._folder)
        self._weights, self._masters = _by_name(self._stored.shapes, self._folder)
        self.model: dict[str, Any] = self._described(told or {})
        self._config = model_config(self.model, str(self._folder))
        self.shapes: Mapping[str, tuple[int, ...]] = llama_shapes(self._config)
        self._boxes = {name: self._box(name, shape) for name, shape in self.shapes.items()}
        self._refuse_unused()
        self._stored.check(sorted({box.key for box in self._boxes.values()}))

    def read(self, name: str) -> Tensor:
        """One weight, of which no more than its layer's fused matrix is in memory, in the type in which it is stored.

        UserError if it cannot be read.
        """
        box = self._boxes[name]
        tensor = self._stored.read(box.key, box.offset, box.size)
        tensor = tensor.reshape(box.size[len(box.size) - len(self.shapes[name]) :])
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensor = _pick(tensor, name.split(".")[-2], self._config)
        return tensor

    def _described(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of `model`: from the arguments of Megatron-LM where there are some, from tensors, and as told."""
        args = read_args(self._folder)
        stated = {} if args is None else model_from_args(args, str(self._folder / COMMON))
        measured = {"tie_word_embeddings": _HEAD not in self._weights, "qk_norm": self._has(_Q_NORM, 0)}
        model = {**measured, **stated, **told}
        missing = [key for key in _ASKED if model.get(key) is None]
        if missing:
            raise UserError(
                f"{self._folder} has no arguments of Megatron-LM in {COMMON} and does not tell {', '.join(missing)}; "
                f"give {' '.join(f'model.{key}=...' for key in missing)}"
            )
        return {**self._measured(model["num_attention_heads"]), **model}

    def _measured(self, heads: Any) -> dict[str, int]:
        """What the shapes of tensors tell of a model with so many query heads."""
        vocab, hidden = self._matrix(_EMBEDDING)
        query, (rows, _) = self._matrix(_O_PROJ)[1], self._matrix(_QKV)
        numbers = [int(found[1]) for name in self._weights if (found := _LAYER.fullmatch(name)) and found[1]]
        stacked = self._weights.get(f"decoder.layers.{_QKV}")
        layers = max(numbers) + 1 if stacked is None else self._stored.shapes[stacked][0]
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or query % heads:
            raise UserError(
                f"{self._folder} has {query} columns in {self._name_of(_O_PROJ)}, which are not those of "
                f"num_attention_heads={heads}; give a model.num_attention_heads that divides them"
            )
        kv_heads, rest = divmod(rows - query, 2 * query // heads)
        if rest or kv_heads < 1:
            raise UserError(
                f"{self._folder} has {rows} rows in {self._name_of(_QKV)}, which are not queries, "
                f"keys and values of num_attention_heads={heads}; give the right model.num_attention_heads"
            )
        return {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": self._matrix(_FC2)[1],
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "head_dim": query // heads,
        }

    def _matrix(self, name: str) -> tuple[int, int]:
        """Rows and columns of a matrix: the embedding, or one of the first layer."""
        shape = self._stored.shapes[self._weights[self._name_of(name)]]
        if len(shape) < 2:
            raise UserError(f"{self._folder} has {self._name_of(name)} in the shape {list(shape)}, which no Llama has")
        return shape[-2], shape[-1]

    def _name_of(self, name: str, layer: int = 0) -> str:
        """Megatron's name of a weight, of this layer's or all layers'. UserError if there is none."""
        alternatives = (name, f"decoder.layers.{name}", f"decoder.layers.{layer}.{name}")
        found = next((each for each in alternatives if each in self._weights), None)
        if found is None:
            missing = name if name in _OUTSIDE.values() else alternatives[2]
            raise UserError(f"{self._folder} has no {missing}, which a Llama has; give a whole checkpoint of a Llama")
        return found

    def _box(self, name: str, shape: tuple[int, ...]) -> _Box:
        """Where the weight with Hugging Face's `name` is. UserError if it is not there, or of another shape."""
        parts = name.removesuffix(".weight").split(".", 3)
        layer = int(parts[2]) if name not in _OUTSIDE else 0
        names = (_OUTSIDE[name],) if name in _OUTSIDE else _IN_LAYER[parts[3]]
        first = next((each for each in names if self._has(each, layer)), names[0])
        theirs = self._name_of(first, layer)
        expected, start = shape, 0
        if first == _QKV:
            heads = self._config.num_attention_heads + 2 * self._config.kv_heads
            expected = heads * self._config.head_size, shape[1]
        elif first == _FC1:
            expected, start = (2 * shape[0], shape[1]), shape[0] * name.endswith("up_proj.weight")
        elif first in (_EMBEDDING, _HEAD):
            rows = self._stored.shapes[self._weights[theirs]][:1]
            expected = (max(shape[0], *rows), shape[1]) if rows else shape
        stacked = name not in _OUTSIDE and theirs == f"decoder.layers.{first}"
        before = (self._config.num_hidden_layers,) if stacked else ()
        self._check_shape(theirs, before + expected)
        size = expected if first == _QKV else shape
        offset = (start, *(0 for _ in shape[1:]))
        return _Box(self._key(theirs), (layer, *offset) if stacked else offset, (1, *size) if stacked else size)

    def _has(self, name: str, layer: int) -> bool:
        return bool({name, f"decoder.layers.{name}", f"decoder.layers.{layer}.{name}"} & self._weights.keys())

    def _key(self, name: str) -> str:
        """The master of a weight if it has the weight's shape, else the weight. UserError if it is no plain numbers."""
        key = self._weights[name]
        master = self._masters.get(key)
        if master is not None and self._stored.shapes[master] == self._stored.shapes[key]:
            key = master
        if self._stored.dtype(key) not in _DTYPES:
            raise UserError(
                f"{self._folder} has {name} in {self._stored.dtype(key)}; expected float32, bfloat16 or float16"
            )
        return key

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        found = self._stored.shapes[self._weights[name]]
        if found != expected:
            raise UserError(
                f"{self._folder} has {name} in the shape {list(found)}, and a Llama of its description in "
                f"{list(expected)}; give the right keys of model, or its own checkpoint"
            )

    def _refuse_unused(self) -> None:
        """UserError for the first weight that is of no layer of the model, or a head of a tied one."""
        keys = {box.key for box in self._boxes.values()}
        for name, key in self._weights.items():
            if not keys & {key, self._masters.get(key)}:
                raise UserError(f"{self._folder} has {name}, which is not of a Llama of its description")


def _pick(fused: Tensor, part: str, config: ModelConfig) -> Tensor:
    """[(heads + 2 * kv heads) * head_dim, hidden] -> the rows of q_proj, k_proj or v_proj."""
    heads = config.num_attention_heads // config.kv_heads
    groups = fused.unflatten(0, (config.kv_heads, heads + 2, config.head_size))
    first, last = {"q_proj": (0, heads), "k_proj": (heads, heads + 1), "v_proj": (heads + 1, heads + 2)}[part]
    return groups[:, first:last].reshape(-1, fused.shape[1])


def _checkpoint(folder: Path) -> Path:
    """The folder of the checkpoint: `folder`, or the newest below it. UserError if there is none in `torch_dist`."""
    found = folder
    if (folder / LATEST).is_file():
        iteration = read_text(folder / LATEST).strip()
        found = folder / (f"iter_{int(iteration):07d}" if re.fullmatch("[0-9]{1,18}", iteration) else "release")
    if any(found.glob("mp_rank_*")):
        raise UserError(
            f"{found} is a checkpoint of one file a rank; save it with Megatron's --ckpt-format torch_dist, or "
            "convert it with --ckpt-convert-format torch_dist"
        )
    if not (found / METADATA).is_file():
        raise UserError(f"{found} has no {METADATA}; give a run of Megatron, or one iter_... of it, in torch_dist")
    try:
        described = json.loads(read_text(found / "metadata.json"))
    except (ValueError, RecursionError):
        described = None
    backend = described.get("sharded_backend") if isinstance(described, dict) else None
    if backend != "torch_dist":
        raise UserError(f"{found / 'metadata.json'} has sharded_backend={as_typed(backend)}; expected torch_dist")
    return found


def _by_name(keys: Mapping[str, tuple[int, ...]], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Keys of the weights by Megatron's names, and keys of masters by those of their weights.

    Megatron's names begin at `embedding` and `decoder`; NeMo sets `module.` before them. UserError for the first tensor
    that no Llama has.
    """
    masters = {found[1]: key for key in keys if (found := _OPTIMIZER.match(key)) and found[1]}
    own = [key for key in keys if not _OPTIMIZER.match(key)]
    embedding = next((key for key in own if key.endswith(_EMBEDDING)), None)
    if embedding is None:
        raise UserError(f"{folder} has no {_EMBEDDING}, which a Llama has; give a whole checkpoint of a Llama")
    prefix = embedding.removesuffix(_EMBEDDING)
    weights = {key.removeprefix(prefix): key for key in own}
    legal = {name for names in _IN_LAYER.values() for name in names}
    for name in weights:
        layer = _LAYER.fullmatch(name)
        if name not in _OUTSIDE.values() and not (layer and layer[2] in legal):
            raise UserError(f"{folder} has {name}, which no Llama has; only Llama-shaped models can be imported")
    return weights, masters
