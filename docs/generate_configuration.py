"""Rewrites the generated parts of docs/configuration.md from the schema: `python docs/generate_configuration.py`.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`. A test holds the page against what this makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megallama.config.deepspeed import deepspeed_config
from megallama.config.json_schema import json_schema
from megallama.config.load import load_config

PAGE = Path(__file__).with_name("configuration.md")
CONFIGS = Path(__file__).parent.parent / "configs"

Schema = dict[str, Any]

_BOUNDS = (
    ("minimum", ">="),
    ("ge", ">="),
    ("exclusiveMinimum", ">"),
    ("maximum", "<="),
    ("exclusiveMaximum", "<"),
    ("lt", "<"),
)
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def keys() -> str:
    """A heading and a table for every section, in the order of the schema."""
    schema = json_schema()
    parts: list[str] = []
    told: set[str] = set()

    def add(name: str, section: Schema) -> None:
        rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        rows += [_row(f"{name}.{key}", key in section.get("required", ()), field) for key, field in _fields(section)]
        parts.append("\n".join([f"### {name}", "", section["description"], "", *rows]))
        for key, field in _fields(section):
            for inner, within in _sections(field):
                if inner not in told:
                    told.add(inner)
                    add(f"{name}.{key}{within}", schema["$defs"][inner])

    for name, field in schema["properties"].items():
        for section, _ in _sections(field):
            described = dict(schema["$defs"][section])
            # The schema says of model: these keys, or an import. What has no default must come from one or the other.
            described.setdefault("required", described.get("anyOf", [{}])[0].get("required", ()))
            add(name, described)
    return "\n\n".join(parts)


def deepspeed_dictionary() -> str:
    """The dictionary of configs/1b.yaml on one node of 8."""
    dictionary = deepspeed_config(load_config(CONFIGS / "1b.yaml"), ranks=8)
    return f"```json\n{json.dumps(dictionary, indent=2)}\n```"


PARTS: dict[str, Callable[[], str]] = {"keys": keys, "deepspeed": deepspeed_dictionary}


def regenerate(page: str) -> str:
    """The page with every generated part made anew."""

    def part(match: re.Match[str]) -> str:
        return f"<!-- generated: {match[1]} -->\n\n{PARTS[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->.*?<!-- end -->", part, page, flags=re.DOTALL)


def _fields(section: Schema) -> list[tuple[str, Schema]]:
    return list(section["properties"].items())


def _sections(field: Schema, within: str = "") -> list[tuple[str, str]]:
    """Names of the sections that a field may hold, and [] behind those that are elements of a list."""
    found = [(field["$ref"].rpartition("/")[2], within)] if "$ref" in field else []
    for branch in (*field.get("anyOf", ()), *field.get("oneOf", ())):
        found += _sections(branch, within)
    return found + (_sections(field["items"], f"{within}[]") if "items" in field else [])


def _row(key: str, required: bool, field: Schema) -> str:
    without = "required" if required else "none"
    default = f"`{json.dumps(field['default'])}`" if "default" in field else without
    meaning = field.get("description", "").replace("|", "\\|")
    return f"| `{key}` | {_value(field)} | {default} | {meaning} |"


def _value(field: Schema) -> str:
    """What may stand there, in words."""
    if branches := field.get("anyOf", field.get("oneOf")):
        return " or ".join(dict.fromkeys(_value(branch) for branch in branches))
    if "$ref" in field:
        return "mapping (below)"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{choice}`" for choice in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        fixed = field.get("prefixItems")
        return f"list of {len(fixed)}, each {_value(fixed[0])}" if fixed else f"list, each {_value(field['items'])}"
    if field["type"] == "object":
        return f"mapping of names to {_value(field['additionalProperties'])}"
    bounds = [f"{sign} {field[name]}" for name, sign in _BOUNDS if name in field]
    return " ".join([_TYPES[field["type"]], ", ".join(bounds)]).strip()


if __name__ == "__main__":
    PAGE.write_text(regenerate(PAGE.read_text()))
