"""The JSON schema of a config file, with what the comments of the schema's fields say."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from megallama.config import data_keys, train_keys
from megallama.config import schema as other_keys
from megallama.config.schema import RunConfig


def json_schema() -> dict[str, Any]:
    """JSON schema of a file, for editors; with `model.import`, which the loader resolves and RunConfig never holds."""
    schema = RunConfig.model_json_schema()
    for name, field, text in _field_docstrings():
        part = schema if name == RunConfig.__name__ else schema["$defs"].get(name)
        if part is not None:
            part["properties"][field]["description"] = text
    model = schema["$defs"]["ModelConfig"]
    model["properties"]["import"] = {
        "type": "string",
        "description": "A Hugging Face config.json or a Meta params.json, relative to this file; keys beside it win.",
    }
    model["anyOf"] = [{"required": model.pop("required")}, {"required": ["import"]}]
    return schema


def _field_docstrings() -> Iterator[tuple[str, str, str]]:
    """(class, field, the string below the field) for every one.

    Pydantic's `use_attribute_docstrings` parses a file once for each class, in every process: a tenth of a plan.
    """
    nodes = (
        node for module in (data_keys, train_keys, other_keys) for node in ast.parse(inspect.getsource(module)).body
    )
    for node in nodes:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in pairwise(node.body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                yield node.name, field.target.id, inspect.cleandoc(str(below.value.value))
