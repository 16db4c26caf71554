"""Shards in order to a dataset, by copying."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megallama.corpus.building.duplicates import find_duplicates
from megallama.corpus.building.recipe import Recipe
from megallama.corpus.building.shard import Shard
from megallama.data.indexed import IndexedWriter, bin_path, idx_path
from megallama.data.info import DatasetInfo, info_path
from megallama.errors import UserError
from megallama.system.lock import Lock
from megallama.system.whole_file import put, remove_leftovers

DUPLICATE = "duplicate"
"""The kind of a document that was left out because its text stands earlier."""

Keep = npt.NDArray[np.bool_] | None
"""Which documents of a shard stay; None for all."""


def remove_unfinished(prefix: str) -> None:
    """Remove what a command that was killed had written of PREFIX; its lock is held."""
    for path in (bin_path(prefix), idx_path(prefix), info_path(prefix)):
        remove_leftovers(path)


def join(
    shards: Callable[[], Iterable[Shard]],
    recipe: Recipe,
    hashes: Callable[[], Mapping[str, Sequence[str]]],
    prefix: str,
    folder: Path,
    lock: Lock,
) -> DatasetInfo:
    """Write PREFIX.bin, .idx and .json of `shards`, which gives them in order, each time anew, in bounded memory.

    `hashes`, asked when the shards are there, gives the SHA-256 of the files of each unit; `folder` takes temporary
    files. UserError if there is no document, or if `lock` was removed.
    """
    kept = _all(shards()) if not recipe.deduplicate else _first_ones(shards, folder)
    writer = IndexedWriter(prefix, recipe.dtype)
    documents, tokens, left_out = 0, 0, Counter[str]()
    try:
        for shard, keep in kept:
            sizes = _copy(shard, keep, writer, recipe.dtype.itemsize)
            documents += len(sizes)
            tokens += int(sizes.sum(dtype=np.int64))
            left_out.update(shard.counts.left_out)
            left_out[DUPLICATE] += shard.counts.documents - len(sizes)
        if not documents:
            raise UserError(_no_text(recipe, left_out))
        info = describe(recipe, hashes(), documents, tokens, +left_out)
        writer.seal()
        lock.check()
        idx_path(prefix).unlink(missing_ok=True)  # The index vouches for the two other files: it goes first, comes last
        put(info_path(prefix), (json.dumps(asdict(info), indent=1) + "\n").encode())
        writer.close()
    finally:
        writer.discard()
    return info


def describe(
    recipe: Recipe, hashes: Mapping[str, Sequence[str]], documents: int, tokens: int, left_out: Mapping[str, int]
) -> DatasetInfo:
    """The manifest."""
    by_path = {
        file.path: sha256 for unit in recipe.units for file, sha256 in zip(unit.files, hashes[unit.key], strict=True)
    }
    sources: list[dict[str, Any]] = [
        {
            "source": source.name,
            "bytes": sum(file.bytes for file in source.files),
            "files": [{"path": f.path, "bytes": f.bytes, "sha256": by_path[f.path]} for f in source.files],
        }
        for source in recipe.sources
    ]
    return DatasetInfo(
        tokenizer=recipe.tokenizer,
        fingerprint=recipe.fingerprint,
        vocab_size=recipe.vocab_size,
        eod_id=recipe.eod_id,
        documents=documents,
        tokens=tokens,
        sources=sources,
        inputs=recipe.inputs,
        left_out=dict(sorted(left_out.items())),
        rules=recipe.rules(),
    )


def _all(shards: Iterable[Shard]) -> Iterator[tuple[Shard, Keep]]:
    for shard in shards:
        yield shard, None


def _first_ones(shards: Callable[[], Iterable[Shard]], folder: Path) -> Iterator[tuple[Shard, Keep]]:
    repeated = find_duplicates(shards, sum(shard.counts.documents for shard in shards()), folder)
    begin = 0
    for shard in shards():
        end = begin + shard.counts.documents
        yield shard, ~repeated[begin:end]
        begin = end


def _copy(shard: Shard, keep: Keep, writer: IndexedWriter, token_bytes: int) -> npt.NDArray[np.int32]:
    """Append the documents that stay; returns their lengths."""
    sizes = shard.sizes()
    with shard.path.open("rb") as file:
        if keep is None:
            writer.copy(file, [(0, shard.token_bytes)], sizes)
            return sizes
        ends = np.cumsum(sizes, dtype=np.int64) * token_bytes
        edges = np.flatnonzero(np.diff(keep, prepend=False, append=False)).reshape(-1, 2)
        stretches = [(int(ends[first - 1]) if first else 0, int(ends[last - 1])) for first, last in edges]
        writer.copy(file, stretches, sizes[keep])
    return sizes[keep]


def _no_text(recipe: Recipe, left_out: Mapping[str, int]) -> str:
    names = ", ".join(source.name for source in recipe.sources)
    why = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items() if count)
    return f"the sources {names} hold no text{f' ({why} documents were left out)' if why else ''}; name others"
