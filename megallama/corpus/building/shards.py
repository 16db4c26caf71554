"""The folder of a build under way: shards, and what is known of their units. A killed build leaves a sound one."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from megallama.corpus.building.recipe import Recipe, Unit
from megallama.corpus.building.shard import Shard, read_shard
from megallama.system.whole_file import put

BY_RULE = frozenset({"empty", "short"})
"""Kinds of what is left out that are no errors."""


def shard_path(folder: Path, unit: Unit, number: int) -> Path:
    """Where the shard of a block is, or will be."""
    return folder / f"{unit.key}-{number:06d}.shard"


class Shards:
    """The folder `folder` for the shards of `recipe`; of other recipes it may hold some, which are left alone."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self._recipe = recipe

    def read(self, unit: Unit, number: int) -> Shard | None:
        """The shard of a block; None if there is none or it is damaged."""
        path = shard_path(self.folder, unit, number)
        return read_shard(path, self._recipe.dtype, hashed=self._recipe.deduplicate)

    def read_again(self, unit: Unit, number: int) -> Shard | None:
        """The shard that an earlier command left; also None if that skipped what this one must not."""
        shard = self.read(unit, number)
        if shard and self._recipe.reading.on_error == "stop" and not BY_RULE.issuperset(shard.counts.left_out):
            return None
        return shard

    def standing(self) -> dict[str, set[int]]:
        """Numbers of the blocks for which there is a file, by the key of their unit."""
        found: defaultdict[str, set[int]] = defaultdict(set)
        for path in self.folder.glob("*.shard"):
            key, _, number = path.stem.rpartition("-")
            if number.isdecimal():  # and not a copy that somebody made
                found[key].add(int(number))
        return found

    def note(self, unit: Unit, name: str, fact: Any) -> None:
        """Keep a fact about a unit."""
        put(self._note(unit, name), json.dumps(fact).encode())

    def noted(self, unit: Unit, name: str) -> Any:
        """The fact that was kept, None if there is none."""
        with suppress(FileNotFoundError, ValueError):
            return json.loads(self._note(unit, name).read_bytes())
        return None

    def remove(self) -> None:
        """All of it. A worker of a build that was killed a moment ago may not have noticed yet, and be in the way."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove what killed workers were writing."""
        for path in self.folder.glob("*.tmp"):
            path.unlink(missing_ok=True)

    def _note(self, unit: Unit, name: str) -> Path:
        return self.folder / f"{unit.key}.{name}"
