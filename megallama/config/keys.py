"""The legal dotted keys of a run, and sentences about illegal ones and about illegal values. Pure."""

from __future__ import annotations

import difflib
import json
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megallama.config.data_keys import MixtureSource, MixtureStage
from megallama.config.schema import RunConfig
from megallama.errors import UserError


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in a field's annotation, also inside `X | None`; in a list are several, which have no keys."""
    for candidate in (annotation, *(() if get_origin(annotation) is tuple else get_args(annotation))):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _dotted(section: type[BaseModel], prefix: str = "") -> tuple[str, ...]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        inner = _section_of(field.annotation)
        if inner is not None:
            keys.extend(_dotted(inner, f"{prefix}{name}."))
    return tuple(keys)


def _lists(section: type[BaseModel], prefix: str = "") -> dict[str, tuple[str, ...]]:
    """The keys that hold a list of sections, each with the names in one of them."""
    found: dict[str, tuple[str, ...]] = {}
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            found |= _lists(inner, f"{prefix}{name}.")
        elif get_origin(field.annotation) is tuple and (listed := _section_of(get_args(field.annotation)[0])):
            found[f"{prefix}{name}"] = tuple(listed.model_fields)
    return found


SECTIONS: tuple[str, ...] = tuple(RunConfig.model_fields)
# model.import is the loader's: it is replaced by the keys of the file that it names.
LEGAL_KEYS: tuple[str, ...] = (*_dotted(RunConfig), "model.import")
MIXTURE = "data.mixture"
LISTS = _lists(RunConfig) | {MIXTURE: (*MixtureSource.model_fields, *MixtureStage.model_fields)}
NAMED = "evaluation.sets."
"""What stands below is named by the user."""
_PARENTS = frozenset(key.rpartition(".")[0] for key in (*LEGAL_KEYS, f"{NAMED}name"))


def is_legal(key: str) -> bool:
    """Whether a run has the dotted key."""
    return key in LEGAL_KEYS or key.startswith(NAMED)


def split_key(key: str) -> list[str]:
    """The parts of a dotted key; what the user names is one, whatever it holds."""
    return key.split(".", NAMED.count(".") if key.startswith(NAMED) else -1)


def refuse_unknown(tree: Any, where: str, prefix: str = "") -> None:
    """UserError for the first key in the nested mapping `tree` that no run has, with the nearest that it has."""
    if not isinstance(tree, dict):
        return
    for name, value in tree.items():
        key = f"{prefix}{name}"
        at = f"{where}: " if where else ""
        if prefix == NAMED and not isinstance(name, str):
            raise UserError(
                f"{at}YAML takes a name in evaluation.sets for the value {as_typed(name)}; write it in quotes"
            )
        if not is_legal(key):
            raise UserError(f"{at}{unknown_key(key)}")
        if key in _PARENTS:
            refuse_unknown(value, where, f"{key}.")


def nearest_key(key: str) -> str | None:
    """The legal dotted key that `key` is most likely meant to be, if any is near."""
    found = _near(key)
    return found[0] if found else None


def _near(key: str) -> list[str]:
    """Legal keys near `key`: the same leaf elsewhere, at its depth if any is, or a near one beside it or anywhere."""
    key = key.strip("-").replace("-", "_").lower()
    if key in LEGAL_KEYS:
        return [key]
    parent, _, leaf = key.rpartition(".")
    same_leaf = [legal for legal in LEGAL_KEYS if legal.rpartition(".")[2] == leaf]
    if same_leaf:
        return [legal for legal in same_leaf if legal.count(".") == key.count(".")] or same_leaf
    siblings = {legal.rpartition(".")[2]: legal for legal in LEGAL_KEYS if legal.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(leaf, siblings, n=1)
    if close:
        return [siblings[close[0]]]
    anywhere = {legal.rpartition(".")[2]: legal for legal in LEGAL_KEYS}
    close = difflib.get_close_matches(leaf, anywhere, n=1, cutoff=0.7)
    if close:
        return [anywhere[close[0]]]
    return difflib.get_close_matches(key, LEGAL_KEYS, n=1, cutoff=0.8)


def unknown_key(key: str) -> str:
    """The sentence about a key that no run has, ending in the nearest or in all that could stand there."""
    near = _near(key)
    if near:
        return f"unknown key {_cut(key)}; did you mean {_or(near)}?"
    parent = key.rpartition(".")[0]
    while parent not in _PARENTS:
        parent = parent.rpartition(".")[0]
    siblings = [legal.rpartition(".")[2] for legal in LEGAL_KEYS if legal.rpartition(".")[0] == parent]
    return f"unknown key {_cut(key)}; legal {f'in {parent}' if parent else 'sections'}: {', '.join(siblings)}"


def explain(error: ValidationError) -> str:
    """One sentence for the first key that pydantic refused: the key, its value, what is expected."""
    details = error.errors(include_url=False)
    if details[0]["type"] == "sentence":  # whole, about several keys
        return details[0]["msg"]
    first = next((detail for detail in details if detail["type"] == "extra_forbidden"), details[0])
    key = _key_of(first)
    if first["type"] in ("extra_forbidden", "missing") and "[" in key:  # in a list: no word of a command line
        return _wrong_key_in_list(first["type"] == "missing", key)
    same_key = [detail for detail in details if _key_of(detail) == key]
    expected = _or(list(dict.fromkeys(_expectation(detail) for detail in same_key)))
    if details[0]["type"] == "missing" and ".".join(map(str, details[0]["loc"])) == key:
        return f"{key} is missing; write it in the file or give {key}=VALUE"
    value = details[0]["input"]
    return f"{key}={as_typed(value)} is not legal; expected {expected}{_nearest_value(same_key, value)}"


def _key_of(detail: ErrorDetails) -> str:
    """The dotted key of an error; pydantic's location goes on into the branches of a union, which have no name.

    Of a list of sections it is that in the element: data.mixture[0].weight.
    """
    key = ""
    for part in detail["loc"]:
        longer = f"{key}.{part}" if key else str(part)
        if key == MIXTURE and isinstance(part, str):  # the branch of the union: a list of sources, or of stages
            continue
        if key.partition("[")[0] in LISTS:
            longer = f"{key}[{part}]" if isinstance(part, int) else longer
        elif not is_legal(longer):
            break
        key = longer
    return key


def _wrong_key_in_list(missing: bool, key: str) -> str:
    """The sentence about a key that an element of a list of sections lacks, or does not have."""
    parent, _, leaf = key.rpartition(".")
    legal = LISTS[key.partition("[")[0]]
    if leaf not in legal and (close := difflib.get_close_matches(leaf, legal, n=1)):
        return f"unknown key {_cut(key)}; did you mean {close[0]}?"
    if not missing and leaf in legal:
        return f"{parent} is one of several sources or stages, and {leaf} is no key of those; give all the same keys"
    what = f"{key} is missing" if missing else f"unknown key {_cut(key)}"
    return f"{what}; legal in {parent}: {', '.join(legal)}"


_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "dict_type": "a mapping of names to datasets such as {web: data/web}",
}
_LISTS = {
    MIXTURE: "a list of sources such as [{path: data/web, weight: 0.6}, {path: data/books, weight: 0.4}]",
    "train.freeze": 'a list of patterns such as [model.embed_tokens.weight, "*norm*"]',
    "optimizer.betas": "a list of two numbers such as [0.9, 0.95]",
    "parallel.layers_per_stage": "a list of whole numbers such as [8, 9, 9, 6]",
    "train.batch_ramp": "a list of up to 64 stages such as [{global_batch_size: 64, until: 252M}]",
    "train.profile.steps": "a list of up to 1000 steps such as [10, 12]",
    "train.profile.ranks": "a list of 1 to 1000 ranks such as [0, 1]",
}
_SECTIONS = {
    "train.average": "a mapping of keys such as {kind: exponential}",
    "train.profile": "a mapping of keys such as {steps: [10, 12]}",
}
_TEXTS = {"checkpoint.resume": "the path of a checkpoint such as runs/quickstart/checkpoints/step_00000700"}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def _expectation(detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"{words} {detail['ctx'][bound]:g}"
    if kind == "literal_error":
        return str(detail["ctx"]["expected"]).replace("'", "")
    # Of "missing" this is an element of a list; a missing key has its own sentence.
    if kind in ("tuple_type", "too_long", "too_short", "missing"):
        key = _key_of(detail)
        if key.startswith(MIXTURE):
            return "text" if isinstance(detail["input"], str) and "[" in key else _LISTS[MIXTURE]
        return _LISTS.get(key, detail["msg"])
    if kind in ("model_type", "model_attributes_type"):
        return _SECTIONS.get(_key_of(detail), "a mapping of keys")
    if kind in ("string_type", "string_pattern_mismatch", "string_too_short"):
        return _TEXTS.get(_key_of(detail), "text")
    return _KINDS.get(kind, detail["msg"])


def _nearest_value(details: list[ErrorDetails], value: Any) -> str:
    """The end of the sentence, where one value is clearly meant: `1e5` for a whole number, `7` for text, `bf61`."""
    kinds = {detail["type"] for detail in details}
    if kinds & {"int_type", "int_parsing", "int_from_float"} and isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if number.is_integer():
            return f"; write {int(number)}"
    if kinds == {"string_type"} and isinstance(value, int | float):
        return f'; write it in quotes, "{as_typed(value)}" (on a command line \'"{as_typed(value)}"\')'
    for detail in details:
        if detail["type"] == "literal_error":
            legal = str(detail["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
            close = difflib.get_close_matches(str(value), legal, n=1)
            return f"; did you mean {close[0]}?" if close else ""
    return ""


def as_typed(value: Any) -> str:
    """A value as it stands in YAML, cut where it is long."""
    bare = isinstance(value, str) and not value.isdigit() and value.isprintable()
    text = value if bare else json.dumps(value, default=str)
    return _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _or(words: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
