"""A small model with random weights, and what it writes without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.config.schema import ModelConfig
from megallama.generation.batch import Batch, Row
from megallama.generation.decoder import first_seen
from megallama.generation.load import Loaded, build
from megallama.generation.sampling import Sampling
from megallama.model.init import initialise
from megallama.model.llama import Llama
from megallama.parallel.mesh import ALONE, Axis
from megallama.text.tokenizer import ByteTokenizer

GREEDY = Sampling(temperature=0.0)
WINDOW = 24
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
}


def shape(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(SHAPE | changes)


def weights(config: ModelConfig) -> dict[str, Tensor]:
    """By logical name, large enough for logits that differ clearly."""
    whole = Llama(config)
    initialise(whole, whole.shard_slices, seed=1, num_layers=config.num_hidden_layers, std=0.3)
    return {
        piece.name: piece.of(whole.get_parameter(name)).detach()
        for name, pieces in whole.shard_slices.items()
        for piece in pieces
    }


def loaded(config: ModelConfig | None = None, tp: Axis = ALONE, **tensors: Tensor) -> Loaded:
    """With the tokenizer of bytes, and no end of a text; `tensors` replace weights."""
    config = config or shape()
    read = (weights(config) | tensors).__getitem__
    model = build(config, read, torch.device("cpu"), torch.float32, tp)
    return Loaded(model, ByteTokenizer(), Path("tiny"), "tiny")


def together(
    model: Loaded, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling = GREEDY
) -> list[list[int]]:
    """What follows each of the prompts, written in one batch."""
    batch = Batch(model, len(prompts))
    rows = [Row(model, prompt, count, sampling) for prompt in prompts]
    for row in rows:
        batch.add(row)
    while batch.rows:
        batch.step()
    return [row.ids[row.begin :] for row in rows]


@torch.inference_mode()
def without_cache(model: Loaded, prompt: Sequence[int], count: int) -> list[int]:
    """What follows, greedily, by the model's own forward over all that is in sight."""
    ids = list(prompt)
    window, known = model.config.max_position_embeddings, model.tokenizer.vocab_size
    for _ in range(count):
        seen = ids[first_seen(len(ids), window) :]
        ids.append(int(model.model(torch.tensor([seen]))[0, -1, :known].argmax()))
    return ids[len(prompt) :]
