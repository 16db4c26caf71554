"""Weights of another program for a new run at any layout: each rank reads those that it has a part of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megallama.checkpoint.logical import LogicalTensor
from megallama.config.schema import ModelConfig
from megallama.errors import UserError
from megallama.formats.folder import open_weights
from megallama.formats.weights import Weights, check_shapes, llama_shapes, model_config

_LENGTH = "max_position_embeddings"


def check_foreign(folder: Path, model: ModelConfig) -> None:
    """UserError unless the weights in `folder` are those of `model`; reads no number."""
    weights, source = open_weights(folder), f"checkpoint.init_from={folder}"
    theirs = fitting(model_config(weights.model, source))
    if _LENGTH not in weights.model:  # Meta does not write it down
        theirs.pop(_LENGTH)
    ours = fitting(model)
    free = stretched(theirs, ours)
    for key, value in theirs.items():
        if ours[key] != value and key not in free:
            found, wanted = json.dumps(value), json.dumps(ours[key])
            raise UserError(
                f"model.{key}={wanted} differs from {found} in {source}; use model.{key}={found}, or import the folder "
                "with `megallama import`, which takes another"
            )
    check_shapes(weights, model, source)


def fitting(model: ModelConfig) -> dict[str, object]:
    """What makes weights fit a model: every key but those that drew them, with what null stands for."""
    tree = model.model_dump(mode="json", exclude={"init", "initializer_range"})
    return tree | {"num_key_value_heads": model.kv_heads, "head_dim": model.head_size}


def stretched(theirs: Mapping[str, object], ours: Mapping[str, object]) -> tuple[str, ...]:
    """The keys in which a new run may differ from the model whose weights it begins with: those of positions, where it
    has more of them. Weights know nothing of these, and learn longer texts with slower rotations (arXiv 2309.16039)."""
    before, now = theirs.get(_LENGTH), ours[_LENGTH]
    longer = isinstance(before, int) and isinstance(now, int) and now > before
    return (_LENGTH, "rope_theta", "rope_scaling") if longer else ()


def wrong_foreign_numbers(folder: Path, model: ModelConfig, part: int, parts: int) -> list[str]:
    """What is not finite in every `parts`-th tensor from `part` on, a reason each."""
    weights = open_weights(folder)
    return wrong_weights(weights, list(llama_shapes(model))[part::parts])


def wrong_weights(weights: Weights, names: Iterable[str]) -> list[str]:
    """The tensors of `names` that hold NaN or infinities, a reason each."""
    found = []
    for name in names:
        tensor = weights.read(name)
        # NaN goes through the sum of the least and the largest, which take no memory.
        least, most = torch.aminmax(tensor)
        if not torch.isfinite(least.float() + most.float()):
            count = tensor.numel() - int(torch.isfinite(tensor).sum())
            if count:
                found.append(f"{name} is not finite in {count} of {tensor.numel()} elements")
    return found


def fill(state: Mapping[str, LogicalTensor], folder: Path) -> None:
    """Overwrite the chunks of `state`, weights by name, with what `folder` has in their places."""
    weights = open_weights(folder)
    for name, tensor in state.items():
        whole = weights.read(name)
        for offset, chunk in tensor.chunks.items():
            here = tuple(slice(o, o + n) for o, n in zip(offset, chunk.shape, strict=True))
            chunk.copy_(whole[here])
