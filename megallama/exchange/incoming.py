"""The folder of another program as a run directory: config, tokenizer, and a checkpoint of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from megallama.checkpoint.commands.progress import shown
from megallama.checkpoint.format import folder_name
from megallama.checkpoint.reading.foreign import wrong_weights
from megallama.checkpoint.state import DataIdentity
from megallama.checkpoint.tensors import Array
from megallama.checkpoint.writing.beginning import write_beginning
from megallama.config.load import apply_override, dump_config, load_config
from megallama.config.schema import ModelConfig, RunConfig
from megallama.errors import UserError
from megallama.exchange.new_folder import new_folder
from megallama.formats.folder import open_weights
from megallama.formats.weights import Weights, check_shapes
from megallama.layout.check import check_trained
from megallama.layout.counts import count_parameters
from megallama.text.tokenizer import Tokenizer, load_tokenizer

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_NOISE = 0.02
"""Of new rows, as a part of the deviation of the old ones."""
_DATA = "data/corpus"
"""Where the config looks for data until it is told."""


@dataclass(frozen=True)
class Imported:
    """What an import has made."""

    config: Path
    parameters: int
    vocab_size: int
    types: list[str]
    """In which the weights are stored in the folder."""


def import_folder(
    folder: Path, out: Path, overrides: Sequence[str], vocab_size: int | None, program: str | None
) -> Imported:
    """Make the run directory `out` from the weights in `folder`, which `program` wrote (None: as its files tell).

    Its config.yaml is complete, with `overrides` laid over it, and starts a run from the checkpoint of step 0 there.
    A `vocab_size` above that of the weights adds rows. UserError if the weights cannot be read, are not finite or do
    not fit the model, the tokenizer is missing or does not fit, or `out` exists or cannot be written.
    """
    weights = open_weights(folder, program, _told(overrides))
    spec = _tokenizer_in(folder, overrides)
    with new_folder(out) as partial, shown() as report:
        path = partial / "config.yaml"
        path.write_text(_first_config(weights, out, spec, overrides))
        config = load_config(path, overrides)
        _refuse_old_run(config)
        check_trained(config.model)
        check_shapes(weights, config.model, str(folder))
        model = _grown(config.model, vocab_size, folder)
        _tokenizer_for(model, config.data.tokenizer).save(partial / "tokenizer")

        types: set[str] = set()

        def read(name: str) -> Array:
            report(name)
            tensor = _finite(weights, name)
            types.add(str(tensor.dtype).removeprefix("torch."))
            return _numbers(tensor, name, model.vocab_size)

        write_beginning(partial / "checkpoints", model, DataIdentity("imported weights", config.train.seed), read)
        path.write_text(dump_config(_final(config, model, out)))
    return Imported(out / "config.yaml", count_parameters(model).total, model.vocab_size, sorted(types))


def _refuse_old_run(config: RunConfig) -> None:
    """UserError where the run that is to begin from the import was begun before: it would go on from where it is."""
    if (Path(config.run.dir) / "checkpoints").exists():
        raise UserError(
            f"{config.run.dir} holds checkpoints of an earlier run, which would go on instead of beginning from this "
            "import; give run.dir= another place, or remove it"
        )


def _told(overrides: Sequence[str]) -> dict[str, Any]:
    """The keys of `model` among the overrides."""
    tree: dict[str, Any] = {"model": {}}
    for override in overrides:
        apply_override(tree, override)
    return tree["model"] if isinstance(tree["model"], dict) else {}


def _first_config(weights: Weights, out: Path, tokenizer: str, overrides: Sequence[str]) -> str:
    """The config before the user's overrides, as YAML."""
    length = min(2048, weights.model.get("max_position_embeddings", 2048))
    data = {"path": _DATA, "tokenizer": tokenizer, "sequence_length": length}
    if any(override.startswith("data.mixture=") for override in overrides):
        del data["path"]
    return yaml.safe_dump({"run": {"dir": f"{out}-continued"}, "model": weights.model, "data": data})


def _final(config: RunConfig, model: ModelConfig, out: Path) -> RunConfig:
    """The config of `model` that starts from the checkpoint in `out`, with the tokenizer there."""
    tokenizer, weights = str(out / "tokenizer"), str(out / "checkpoints" / folder_name(0))
    return config.model_copy(
        update={
            "model": model,
            "data": config.data.model_copy(update={"tokenizer": tokenizer}),
            "checkpoint": config.checkpoint.model_copy(update={"init_from": weights}),
        }
    )


def _tokenizer_in(folder: Path, overrides: Sequence[str]) -> str:
    """The specification of the folder's tokenizer. UserError if there is none, and the user names none."""
    if any(override.startswith("data.tokenizer=") for override in overrides):
        return "bytes"  # the override takes its place
    found = {"tokenizer.json": "hf:", "tokenizer.model": "", "tokenizer": ""}
    for name, prefix in found.items():
        if (folder / name).exists():
            return f"{prefix}{folder / name}"
    raise UserError(f"{folder} has no tokenizer.json; name the model's tokenizer with data.tokenizer=")


def _tokenizer_for(model: ModelConfig, spec: str) -> Tokenizer:
    """The tokenizer; UserError if it has ids that the model has no row for."""
    tokenizer = load_tokenizer(spec)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer {spec} has {tokenizer.vocab_size} ids, and the model {model.vocab_size}; name the model's "
            f"own with data.tokenizer=, or add rows with --vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def _grown(model: ModelConfig, vocab_size: int | None, folder: Path) -> ModelConfig:
    """The model with the vocabulary that was asked for. UserError if that is smaller."""
    if vocab_size is None:
        return model
    if vocab_size < model.vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size} is below the {model.vocab_size} of {folder}; rows are added, never dropped"
        )
    return model.model_copy(update={"vocab_size": vocab_size})


def _finite(weights: Weights, name: str) -> Tensor:
    """One weight. UserError if it is not finite."""
    if wrong := wrong_weights(weights, [name]):
        raise UserError(f"{wrong[0]}; give weights that training can have")
    return weights.read(name)


def _numbers(tensor: Tensor, name: str, rows: int) -> Array:
    """One weight in fp32, with as many `rows` where the vocabulary is."""
    tensor = tensor.float()
    if name in _VOCABULARY and len(tensor) < rows:
        tensor = grow(tensor, rows)
    return np.ascontiguousarray(tensor.numpy())


def grow(tensor: Tensor, rows: int) -> Tensor:
    """An embedding [tokens, hidden] with new rows up to `rows`: the mean of the old ones and small noise, always alike.

    Rows that are equal would stay so where their tokens do not occur (Hewitt 2021, "Initializing New Word Embeddings
    for Pretrained Language Models").
    """
    noise = torch.randn(rows - len(tensor), tensor.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.cat([tensor, tensor.mean(dim=0) + _NOISE * tensor.std(dim=0, correction=0) * noise])
