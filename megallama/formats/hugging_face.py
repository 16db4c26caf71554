"""The folder of a Hugging Face Llama: `config.json`, and weights in safetensors, or in `.bin` without its code.

That of a Qwen3 where the model has `qk_norm`. Read one tensor at a time, mapped from the files; written one at a time,
so that no more than one is in memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megallama.config.importing import ARCHITECTURES, model_from_hugging_face
from megallama.config.keys import as_typed
from megallama.config.load import parse_json, read_text
from megallama.config.schema import ModelConfig
from megallama.errors import UserError
from megallama.formats.pickled import read_pickled
from megallama.formats.weights import Weights, model_config
from megallama.system.regular_file import open_regular

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_SINGLE = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where weights are looked for, in the order in which transformers does."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE = 1 << 22
"""Elements converted and written at once."""
SHARD_BYTES = 5 * 10**9
"""What a shard holds at most, if it holds more than one tensor."""


class HuggingFace:
    """The weights of the Hugging Face folder at `folder`; `Weights`.

    UserError if it is of another architecture than Llama, or its files are damaged, disagree or are not in it. Rows of
    the embedding and the head beyond vocab_size are padding, and left out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        described = _described(folder / CONFIG)
        # What config.json leaves out has transformers' default, of which this one is not ours.
        self.model = model_from_hugging_face(described, str(folder / CONFIG))
        config = model_config(self.model, str(folder / CONFIG))
        self._rows = config.vocab_size
        self._files = {name: file for file in _files(folder) for name in file.shapes if "rotary_emb" not in name}
        if config.tie_word_embeddings and _HEAD in self._files:
            if not torch.equal(self.read(_EMBEDDING), self.read(_HEAD)):
                raise UserError(
                    f"{folder} has tie_word_embeddings=true, and {_HEAD} that differs from {_EMBEDDING}; "
                    "set it to false, or remove the tensor"
                )
            del self._files[_HEAD]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every weight, without padding of the vocabulary."""
        return {name: self._unpadded(name, file.shapes[name]) for name, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """One weight, mapped from its file, in the type in which it is stored. UserError if there is none."""
        if name not in self._files:
            raise UserError(f"{self._folder} has no {name}, which a Llama has; complete the folder")
        tensor = self._files[name].read(name)
        return tensor[: self._rows] if name in (_EMBEDDING, _HEAD) and tensor.dim() else tensor

    def _unpadded(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (min(shape[0], self._rows), *shape[1:]) if name in (_EMBEDDING, _HEAD) and shape else shape


def _described(path: Path) -> dict[str, Any]:
    """What config.json says, of a Llama whose weights are plain numbers. UserError for any other."""
    described = parse_json(read_text(path), str(path))
    if not isinstance(described, dict):
        raise UserError(f"{path} is no mapping; expected the config.json of a Llama")
    kind = described.get("model_type", "llama")
    expected = ARCHITECTURES.get(kind, "LlamaForCausalLM") if isinstance(kind, str) else "LlamaForCausalLM"
    if described.get("architectures") not in (None, [expected]):
        raise UserError(f"{path} has architectures={as_typed(described['architectures'])}; expected {expected}")
    if described.get("quantization_config") is not None:
        raise UserError(f"{path} has a quantization_config; give the folder of the model before it was quantized")
    rope = described.get("rope_parameters")
    rotated = rope.get("partial_rotary_factor", 1) if isinstance(rope, dict) else 1
    if rotated != 1:
        raise UserError(f"{path} has partial_rotary_factor={as_typed(rotated)}; expected 1, which is Llama's")
    return described


class _File(Protocol):
    """A file of weights."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def read(self, name: str) -> Tensor: ...


class _Safetensors:
    """The tensors of one safetensors file, mapped."""

    def __init__(self, path: Path) -> None:
        try:
            open_regular(path).close()
            self._file = safe_open(path, framework="pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118  # it is no mapping
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); complete the folder") from None
        except SafetensorError as error:
            raise UserError(f"{path} is no whole safetensors file ({error}); copy it again") from None
        for name, part in slices.items():
            if part.get_dtype() not in _DTYPES:
                raise UserError(f"{path} has {name} in {part.get_dtype()}; expected F32, BF16 or F16")
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class _Bin:
    """The tensors of one `.bin` file, mapped."""

    def __init__(self, path: Path) -> None:
        self._tensors = read_pickled(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _files(folder: Path) -> list[_File]:
    """The files of weights of a folder. UserError if there are none, or they are not those of their index."""
    found = next((folder / name for name in _SINGLE if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no weights; expected model.safetensors or {INDEX}")
    opened = _Bin if found.name.startswith("pytorch_model") else _Safetensors
    if not found.name.endswith(".json"):
        return [opened(found)]
    named = _weight_map(found)
    files: list[_File] = []
    for name in dict.fromkeys(named.values()):
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{found} names the file {name}, which is not in its folder; expected bare names")
        file = opened(folder / name)
        for tensor in sorted(set(file.shapes) ^ {each for each, at in named.items() if at == name}):
            where = "has" if tensor in file.shapes else "lacks"
            raise UserError(f"{folder / name} {where} {tensor}, and {found.name} says otherwise; copy both again")
        files.append(file)
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Of every tensor the file that has it, as an index says. UserError if it does not."""
    content = parse_json(read_text(index), str(index))
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; copy it again")
    return found


def write_hugging_face(
    weights: Weights,
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    eod_id: int | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write into `folder` what transformers loads as a model of `config`, a tensor at a time in memory.

    It is a LlamaForCausalLM, or with `qk_norm` a Qwen3ForCausalLM. `eod_id` begins and ends documents; None where it is
    not known. UserError for numbers too large for `dtype`, OSError if the disk is full.
    """
    shards = _shards(weights.shapes, dtype, shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        write_safetensors(folder / file, {name: weights.shapes[name] for name in names}, weights, dtype)
    total = sum(_bytes(shape, dtype) for shape in weights.shapes.values())
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / CONFIG, config_json(config, dtype, eod_id))
    ends = {} if eod_id is None else {"bos_token_id": eod_id, "eos_token_id": eod_id}
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})


def config_json(config: ModelConfig, dtype: torch.dtype, eod_id: int | None) -> dict[str, Any]:
    """What describes the model to transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5."""
    scaling = None if config.rope_scaling is None else config.rope_scaling.model_dump(mode="json")
    if scaling is not None and scaling["rope_type"] == "linear":
        scaling = {key: scaling[key] for key in ("rope_type", "factor")}
    name = str(dtype).removeprefix("torch.")
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "initializer_range",
    )
    kind = "qwen3" if config.qk_norm else "llama"
    own = {"sliding_window": None, "use_sliding_window": False} if config.qk_norm else {"mlp_bias": False}
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{key: getattr(config, key) for key in same},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        **own,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "dtype": name,
        "torch_dtype": name,
    }


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], weights: Weights, dtype: torch.dtype) -> None:
    """Write the tensors of `shapes` as `dtype` into one safetensors file: eight bytes of length, JSON, numbers.

    Tensor by tensor, unlike safetensors' own writer, which takes all of them at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _bytes(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in shapes:
            for piece in pieces(name, weights.read(name), dtype):
                file.write(piece)


def pieces(name: str, tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The little-endian bytes of a finite tensor as `dtype`, in row-major order.

    UserError where `dtype` has no number as large: the largest of fp32 round to infinity in bf16.
    """
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE].to(dtype).contiguous()
        if not torch.isfinite(torch.stack(torch.aminmax(piece))).all():
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{name} has numbers that are too large for {kind}; use --dtype fp32")
        yield piece.view(torch.uint8).numpy().data


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, most: int) -> list[list[str]]:
    """Names of the tensors of each shard, in the order of the model."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if shards[-1] and size + _bytes(shape, dtype) > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(shape, dtype)
    return shards


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
