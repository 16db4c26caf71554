"""The parts of a dataset, which were built apart, to the dataset that one build makes."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megallama.corpus.building.build import (
    PART_NAME,
    check_prefix,
    part_folder,
    remove_part,
    standing_dataset,
    stopped_builds_explained,
)
from megallama.corpus.building.join import join, remove_unfinished
from megallama.corpus.building.recipe import Recipe, Unit, recipe_from_json
from megallama.corpus.building.shard import Shard
from megallama.corpus.building.shards import Shards
from megallama.data.indexed import idx_path
from megallama.data.info import DatasetInfo, open_described
from megallama.errors import UserError
from megallama.system.lock import beside, output_lock

_NAME = re.compile(r".*\.part-([1-9][0-9]*)-of-([1-9][0-9]*)", re.DOTALL)


def merge_parts(prefix: str, *, force: bool = False) -> tuple[DatasetInfo, bool]:
    """Make PREFIX.bin, PREFIX.idx and PREFIX.json of the folders PREFIX.part-I-of-N, and remove these.

    Returns what it holds, and whether it stood there already. UserError if parts are missing, are not finished, or are
    not of one dataset, and for another dataset at PREFIX, unless `force`.
    """
    check_prefix(prefix)
    with stopped_builds_explained(prefix, 1), ExitStack() as locks:
        lock = locks.enter_context(output_lock(beside(Path(prefix)), f"PREFIX {prefix}", "PREFIX"))
        remove_unfinished(prefix)
        found = _folders(prefix)
        folders = [folder for folder in found if any(folder.iterdir())]
        if not folders and idx_path(prefix).exists() and (info := open_described(prefix)[1]):
            _remove(found)
            return info, True
        for folder in found:
            locks.enter_context(output_lock(beside(folder), f"part {folder}", "PREFIX"))
        recipe = _recipe(folders, prefix)
        if not force and (standing := standing_dataset(prefix, recipe)):
            _remove(found)  # the merge that made it was stopped
            return standing, True
        merging = _Merging(_all_parts(folders, prefix), recipe)
        info = join(merging.in_order, recipe, merging.hashes, prefix, Path(prefix).parent, lock)
        _remove(folders)
        return info, False


def _folders(prefix: str) -> list[Path]:
    """The folders of parts, in order."""
    found: list[tuple[int, Path]] = []
    for name in glob.glob(f"{glob.escape(prefix)}.part-*-of-*"):
        if (match := _NAME.fullmatch(name)) and os.path.isdir(name):
            found.append((int(match[1]), Path(name)))
    return [folder for _, folder in sorted(found)]


def _recipe(folders: Sequence[Path], prefix: str) -> Recipe:
    """What the parts were made by; UserError if one is not finished, is not what its name says, or is of another."""
    first: Recipe | None = None
    for folder in folders:
        try:
            content = json.loads((folder / PART_NAME).read_bytes())
            part, recipe = content["part"], recipe_from_json(content["recipe"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise UserError(f"part {folder} is not finished; repeat the command that builds it") from None
        if folder != (named := part_folder(prefix, (part[0], part[1]))):
            raise UserError(f"part {folder} is a copy of {named}; remove it, and build the part that it should be")
        first = first or recipe
        if recipe.inputs != first.inputs:
            raise UserError(
                f"part {folder} was made from other sources, with another tokenizer or by other rules than "
                f"{folders[0]}; build it again, or remove it"
            )
    if first is None:
        raise UserError(f"there are no parts {prefix}.part-I-of-N; build them: megallama data build --part I/N")
    return first


def _all_parts(folders: Sequence[Path], prefix: str) -> list[Path]:
    """The folders, if they are all that there have to be; UserError if not."""
    counts = sorted({int(match[2]) for folder in folders if (match := _NAME.fullmatch(str(folder)))})
    if len(counts) > 1:
        raise UserError(f"{prefix} has parts of {' and of '.join(map(str, counts))}; remove those that are too many")
    wanted = [part_folder(prefix, (i, counts[0])) for i in range(counts[0])]
    if missing := [folder.name for folder in wanted if folder not in folders]:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise UserError(
            f"{prefix} lacks {', '.join(missing[:8])}{more}; build {'them' if len(missing) > 1 else 'it'} first"
        )
    return wanted


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        remove_part(folder)


class _Merging:
    """The shards of all parts as those of one build."""

    def __init__(self, folders: Sequence[Path], recipe: Recipe) -> None:
        self._parts = [Shards(folder, recipe) for folder in folders]
        self._recipe = recipe
        self._first: dict[str, Unit] = {}
        """Of the units with one key, the one that was built."""
        for unit in recipe.units:
            self._first.setdefault(unit.key, unit)

    def in_order(self) -> Iterator[Shard]:
        """All shards. UserError if one is not there."""
        for unit in self._recipe.units:
            readers = self._readers(unit)
            for number in range(max(self._noted(part, unit, "blocks") for part in readers)):
                part = readers[number % len(readers)]
                shard = part.read(unit, number)
                if shard is None:
                    raise _damaged(part)
                yield shard

    def hashes(self) -> dict[str, list[str]]:
        """SHA-256 of the files of each unit."""
        found = {}
        for unit in self._first.values():
            readers = self._readers(unit)
            found[unit.key] = self._noted(readers[unit.number % len(readers)], unit, "sha256")
        return found

    def _readers(self, unit: Unit) -> list[Shards]:
        return [self._parts[part] for part in self._recipe.shares(self._first[unit.key], len(self._parts))]

    def _noted(self, part: Shards, unit: Unit, name: str) -> Any:
        fact = part.noted(unit, name)
        if fact is None:
            raise _damaged(part)
        return fact


def _damaged(part: Shards) -> UserError:
    return UserError(f"part {part.folder} is damaged: a file is missing or cut short; build it again with --force")
