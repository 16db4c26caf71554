"""Weights of another program, and whether they are those of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import ValidationError
from torch import Tensor

from megallama.config.keys import explain
from megallama.config.schema import ModelConfig, RunConfig
from megallama.errors import UserError
from megallama.layout.check import check_trained
from megallama.layout.counts import weight_shapes


class Weights(Protocol):
    """Weights under the names of Hugging Face's LlamaForCausalLM, read one at a time."""

    @property
    def model(self) -> dict[str, Any]:
        """The keys of the config section `model` that the source states, as `config.importing` makes them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every weight; a tied head is none of its own."""

    def read(self, name: str) -> Tensor:
        """One weight, whole, on the CPU, in the type in which it is stored. UserError if it cannot be read."""


def model_config(model: Mapping[str, Any], source: str) -> ModelConfig:
    """The model that these keys of the section `model` describe. UserError, begun by `source`, if there is none."""
    try:
        content = json.dumps({"model": model, "data": {"path": "-"}})
        config = RunConfig.model_validate_json(content, strict=True).model
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}") from None
    check_trained(config)
    return config


def llama_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What a model of this shape has, the vocabulary unpadded, a tied head left out."""
    return weight_shapes(config)


def check_shapes(weights: Weights, config: ModelConfig, source: str) -> None:
    """UserError for the first tensor of `source` that is missing, of another shape or not of the model."""
    found, expected = weights.shapes, llama_shapes(config)
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{source} has no {name}, which a model of its description has; complete the folder")
        if tuple(found[name]) != shape:
            raise UserError(
                f"{source} has {name} in the shape {list(found[name])}, and the model in {list(shape)}; "
                "mend the description of the model, or give its own weights"
            )
    for name in found:
        if name not in expected:
            raise UserError(f"{source} has {name}, which is not of a Llama of its description; give one without it")
