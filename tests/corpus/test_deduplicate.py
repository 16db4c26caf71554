"""Of equal documents the first stays, whatever the workers, the memory and the sources they stand in."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from megallama.corpus.building import duplicates, recipe
from megallama.corpus.building.build import build_dataset
from megallama.corpus.building.duplicates import find_duplicates
from megallama.corpus.building.shard import Shard
from megallama.corpus.reading import json_lines
from megallama.data.indexed import open_indexed


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts_of(prefix: Path) -> list[str]:
    found = open_indexed(str(prefix))
    return [bytes(found.document(i)[:-1].astype("u1")).decode() for i in range(found.num_documents)]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_of_equal_documents_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 500)
    monkeypatch.setattr(recipe, "UNIT_BYTES", 2000)
    random = Random(1)
    texts = [f"naïve {random.randrange(150)}" for _ in range(400)]
    sources = [write(tmp_path / f"{i}.jsonl", texts[100 * i : 100 * i + 100]) for i in range(4)]
    info, _ = build_dataset(sources, str(tmp_path / "d"), "bytes", workers=workers, deduplicate=True)
    first_ones = list(dict.fromkeys(texts))
    assert texts_of(tmp_path / "d") == first_ones
    assert (info.documents, info.left_out) == (len(first_ones), {"duplicate": 400 - len(first_ones)})
    assert info.rules["deduplicate"] is True
    assert info.tokens == len(open_indexed(str(tmp_path / "d")).tokens)


def test_no_document_is_dropped_unasked(tmp_path: Path) -> None:
    info, _ = build_dataset([write(tmp_path / "a.jsonl", ["a"] * 3)], str(tmp_path / "d"), "bytes", workers=1)
    assert (info.documents, info.left_out) == (3, {})


class Hashes(Shard):
    """A shard of hashes alone."""

    def __init__(self, values: np.ndarray) -> None:
        object.__setattr__(self, "values", values)

    def hashes(self) -> np.ndarray:
        return self.values


@pytest.mark.parametrize(("at_once", "open_files"), [(1 << 20, 128), (1000, 128), (1000, 3), (1, 7)])
def test_hashes_meet_however_few_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, open_files: int
) -> None:
    monkeypatch.setattr(duplicates, "HASHES_AT_ONCE", at_once)
    monkeypatch.setattr(duplicates, "OPEN_FILES", open_files)
    random = np.random.default_rng(2)
    count = 10_000 if at_once > 1 else 100
    pool = random.integers(0, 1 << 63, (count // 2, 2), dtype=np.uint64)
    pool[1::2, 0] = pool[::2, 0]  # halves that are equal are not enough
    hashes = pool[random.integers(0, len(pool), count)]
    shards = [Hashes(part) for part in np.array_split(hashes, 7)]
    found = find_duplicates(lambda: shards, count, tmp_path)
    seen: set[bytes] = set()
    for row, repeated in zip(hashes, found, strict=True):
        assert (row.tobytes() in seen) == repeated
        seen.add(row.tobytes())
    assert 0 < found.sum() < count
    assert list(tmp_path.iterdir()) == []
