"""In which keys the configs of runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megallama.errors import UserError, printable


def differences(runs: Sequence[Path]) -> dict[str, list[str]]:
    """The values of each run by the keys in which not all agree; nothing of runs whose config cannot be read."""
    if len(runs) == 1:
        return {}
    from megallama.config.load import parse_yaml, read_text  # with the schema, a quarter of a second

    flat = []
    for run in runs:
        try:
            flat.append(dict(_flat(parse_yaml(read_text(run / "config.yaml"), str(run)))))
        except UserError:
            flat.append({})
    known = [keys for keys in flat if keys]
    every = dict.fromkeys(key for keys in known for key in keys if key != "run.dir")
    differing = [key for key in every if len({keys.get(key, "") for keys in known}) > 1]
    return {printable(key): [printable(keys.get(key, "")) for keys in flat] for key in differing}


def _flat(tree: Any, above: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{above}.{key}" if above else str(key))
    else:
        yield above, "" if tree is None else str(tree)
