"""From a YAML file and `key.sub=value` overrides to a RunConfig, and back.

Precedence: defaults of the schema < what `model.import` names < the file < overrides. Every mistake is a UserError of
one sentence that names the key as it is typed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megallama.config.importing import model_from_foreign
from megallama.config.keys import (
    SECTIONS,
    as_typed,
    explain,
    is_legal,
    nearest_key,
    refuse_unknown,
    split_key,
    unknown_key,
)
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.system.regular_file import open_regular

Tree = dict[str, Any]

# A run's YAML has a few kilobytes, some hundred values and three levels; whatever has more is another file.
LARGEST_FILE = 1 << 20
MOST_VALUES, MOST_LEVELS = 10_000, 20
LONGEST_NUMBER = 100
"""Characters: what more of them stand for, Python prints and floats hold no longer."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key given twice, of which YAML takes the last, and aliases, which grow without end.

    Also tags, which make of a text what it is not, numbers without end, and more values and levels than a run can have:
    the parser is slow, and goes as deep as the text.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values, self._level = 0, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._values += 1
        self._level += 1
        for count, most, what in ((self._values, MOST_VALUES, "values"), (self._level, MOST_LEVELS, "levels")):
            if count > most:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.composer.ComposerError(
                    None, None, f"more than {most:,} {what}, which no run has; give the file of a run", mark
                )
        node = self._composed(parent, index)
        self._level -= 1
        return node

    def _composed(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"the alias *{event.anchor} is not read here; write the value out"
        elif event.tag is not None:
            problem = f"the tag {event.tag} is not read here; leave it out"
        if problem is not None:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(None, None, _too_long(len(node.value)), node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is given twice; keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the file describes, with each `key.sub=value` of `overrides` laid over it, the last one winning.

    Values of overrides are YAML: `null`, `true`, `[0.9, 0.95]`, `{rope_type: linear, factor: 2}`. UserError for
    whatever is wrong with either. Checks that need two sections or a world size are `config.check`'s.
    """
    path = Path(path)
    tree = _read_tree(path)
    refuse_unknown(tree, where=str(path))
    for override in overrides:
        apply_override(tree, override)
    _resolve_import(tree, path.parent)
    try:
        # By way of JSON: strict there, pydantic takes a list for a tuple, but neither `true` nor "3" for a number.
        content = json.dumps(tree, default=str, skipkeys=True, ensure_ascii=False).encode()
        return RunConfig.model_validate_json(content, strict=True)
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise UserError(f"{path}: {half!r} is half of a character; write the character itself") from None
    except ValidationError as error:
        raise UserError(explain(error)) from None


def dump_config(config: RunConfig) -> str:
    """Complete YAML, defaults included, that loads to an equal object."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    return text


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document by the rules of this module; `where` begins the sentence of a UserError."""
    try:
        # _Loader derives from SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{at}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not legal YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; a run has at most three levels") from None


def _too_long(characters: int) -> str:
    return f"a number of {characters} characters; a run has none of more than {LONGEST_NUMBER}"


def parse_json(text: str, where: str) -> Any:
    """One JSON document by the same rules; `where` begins the sentence of a UserError."""
    level = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[][{}]', text):
        level += (found[0] in "[{") - (found[0] in "]}")
        if level > MOST_LEVELS:
            line = 1 + text.count("\n", 0, found.start())
            raise UserError(f"{where}, line {line}: more than {MOST_LEVELS} levels, which no model has")

    def whole(digits: str) -> int:
        if len(digits) > LONGEST_NUMBER:
            raise UserError(f"{where}: {_too_long(len(digits))}")
        return int(digits)

    try:
        return json.loads(text, parse_int=whole)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not legal JSON at {at}; expected a config.json or params.json") from None


def _read_tree(path: Path) -> Tree:
    tree = parse_yaml(read_text(path), str(path))
    if tree is None:
        raise UserError(f"{path} is empty; a run needs at least model and data, as in configs/quickstart.yaml")
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} is a {type(tree).__name__} at its top level; expected sections such as model: and data:"
        )
    # `train:` with every line below it commented out is an empty section.
    for section in SECTIONS:
        if tree.get(section) is None:
            tree[section] = {}
    return tree


def read_text(path: Path) -> str:
    """The file's text; UserError with near names if there is no such file, or if it cannot be a configuration."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory; {_near_files(path / 'config.yaml')}")
        with open_regular(path) as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; {_near_files(path)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a readable file") from None
    if len(content) > LARGEST_FILE:
        raise UserError(
            f"{path} is larger than {LARGEST_FILE} bytes; expected a configuration, a few kilobytes of text"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); expected a configuration") from None


def _near_files(path: Path) -> str:
    """The end of a sentence about a missing file: the closest names beside it, else in configs/."""
    suffix = path.suffix or ".yaml"
    for folder in (path.parent, Path("configs")):
        files = {file.stem: file for file in sorted(folder.glob("*")) if file.suffix == suffix}
        close = difflib.get_close_matches(path.stem, files, n=2, cutoff=0.4) or sorted(files)[:3]
        if close:
            return f"did you mean {' or '.join(str(files[name]) for name in close)}?"
    return f"{path.parent} has no *{suffix}; give the path of a file that exists"


def apply_override(tree: Tree, override: str) -> None:
    """Lay one `key.sub=value` over `tree`, in place. UserError if it is none, or there is no such key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        known = nearest_key(key) or "train.steps"
        raise UserError(f"the override {override} is not KEY=VALUE; write it as {known}=VALUE")
    value = parse_yaml(text, f"{key}={as_typed(text)}")
    _refuse_comment(key, text)
    if not is_legal(key):
        raise UserError(unknown_key(key))
    refuse_unknown(value, where="", prefix=f"{key}.")
    *sections, leaf = split_key(key)
    node = tree
    for section in sections:
        if not isinstance(node.get(section), dict):
            node[section] = {}
        node = node[section]
    node[leaf] = {} if value is None and key in SECTIONS else value


def _refuse_comment(key: str, text: str) -> None:
    """UserError where YAML takes the end of an override for a comment: on a command line it is a part of the value."""
    if "#" in text:
        node = yaml.compose(text, Loader=_Loader)
        if text[node.end_mark.index if node else 0 :].strip():
            raise UserError(f"{key}={as_typed(text)}: YAML reads no further than the #; write {key}={json.dumps(text)}")


def _resolve_import(tree: Tree, folder: Path) -> None:
    """Replace `model.import` by the keys of the file that it names, under those that stand beside it; in place."""
    model = tree["model"]
    if not isinstance(model, dict) or "import" not in model:
        return
    name = model.pop("import")
    if not isinstance(name, str):
        raise UserError(f"model.import={as_typed(name)} is not legal; expected a path to config.json or params.json")
    foreign = parse_json(read_text(folder / name), f"model.import={name}")
    tree["model"] = {**model_from_foreign(foreign, f"model.import={name}"), **model}
