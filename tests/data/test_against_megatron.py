"""Datasets go both ways between megatron-core's own writer and reader and those here, token for token."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallama.corpus.building.build import build_dataset
from megallama.data.indexed import DTYPE_CODES, IndexedWriter, open_indexed, token_dtype
from megallama.errors import UserError

pytestmark = pytest.mark.peers

DOCUMENTS = [[[5, 6, 7], [8]], [], [[9]], [[]], [[1, 2], [], [3, 4]], [[]], [[0]], []]
"""Sequences of each document."""


def megatron() -> Any:
    """Its module, which takes seconds to import."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def joined(documents: list[list[list[int]]]) -> list[list[int]]:
    return [[number for sequence in document for number in sequence] for document in documents]


def by_megatron(prefix: Path, documents: list[list[list[int]]], dtype: Any, multimodal: bool = False) -> str:
    builder = megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for number, document in enumerate(documents):
        if number % 2:  # in one call
            (flat,), lengths = joined([document]), [len(sequence) for sequence in document]
            builder.add_document(torch.tensor(flat, dtype=torch.int64), lengths, [1] * len(lengths))
        else:
            for sequence in document:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64), mode=number % 3)
            builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def read_here(prefix: str) -> list[list[int]]:
    found = open_indexed(prefix)
    return [found.document(number).tolist() for number in range(found.num_documents)]


def read_by_megatron(prefix: str, mmap: bool = True) -> list[list[int]]:
    found = megatron().IndexedDataset(prefix, mmap=mmap)
    edges = found.document_indices.tolist()
    sequences = [found[number].tolist() for number in range(len(found))]
    return joined([sequences[begin:end] for begin, end in pairwise(edges)])


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("name", DTYPE_CODES.values())
def test_what_megatron_writes_is_read_here(tmp_path: Path, name: str, multimodal: bool) -> None:
    limits = np.iinfo(np.dtype(name))
    documents = [*DOCUMENTS, [[limits.min, limits.max], [limits.max]]]
    prefix = by_megatron(tmp_path / "d", documents, np.dtype(name).type, multimodal)
    assert read_here(prefix) == joined(documents)
    assert open_indexed(prefix).tokens.dtype == np.dtype(name)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_numbers_that_are_no_ids_are_refused(tmp_path: Path, name: str) -> None:
    prefix = by_megatron(tmp_path / "d", DOCUMENTS, getattr(np, name))
    with pytest.raises(UserError, match=r"d\.idx has version 1 and token type [67]; known: version 1, types "):
        open_indexed(prefix)


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 65_501, 128_256])
def test_the_type_of_a_vocabulary_and_every_byte_are_those_of_megatron(tmp_path: Path, vocab_size: int) -> None:
    ids = [[vocab_size - 1, 0], [7], [vocab_size - 2, vocab_size - 1, 1]]
    theirs = by_megatron(tmp_path / "theirs", [[row] for row in ids], megatron().DType.optimal_dtype(vocab_size))
    writer = IndexedWriter(str(tmp_path / "ours"), token_dtype(vocab_size))
    for row in ids:
        writer.add(np.array(row, token_dtype(vocab_size)), np.array([len(row)], "<i4"))
    writer.close()
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/ours{suffix}").read_bytes() == Path(theirs + suffix).read_bytes()
    assert read_here(theirs) == ids


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 documents of bytes, which two processes made."""
    folder = tmp_path_factory.mktemp("built")
    lines = [json.dumps({"text": f"naïve {number} 日本 " * (number % 7 + 1)}) for number in range(300)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    build_dataset([str(folder / "a.jsonl")], str(folder / "d"), "bytes", workers=2)
    return str(folder / "d")


@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_built_here_is_read_by_megatron(built: str, mmap: bool) -> None:
    expected = [[*f"naïve {number} 日本 ".encode()] * (number % 7 + 1) + [256] for number in range(300)]
    assert read_by_megatron(built, mmap) == expected == read_here(built)


def test_what_megatron_joins_is_read_here(built: str, tmp_path: Path) -> None:
    some = by_megatron(tmp_path / "some", DOCUMENTS, np.uint16)
    builder = megatron().IndexedDatasetBuilder(f"{tmp_path}/all.bin", dtype=np.uint16)
    for prefix in (some, built, some):
        builder.add_index(prefix)
    builder.finalize(f"{tmp_path}/all.idx")
    assert read_here(f"{tmp_path}/all") == [*joined(DOCUMENTS), *read_here(built), *joined(DOCUMENTS)]


def test_sequences_behind_the_last_document_are_refused_here_as_there(tmp_path: Path) -> None:
    builder = megatron().IndexedDatasetBuilder(f"{tmp_path}/d.bin", dtype=np.uint16)
    builder.add_item(torch.tensor([1, 2]))  # and no end of a document
    builder.finalize(f"{tmp_path}/d.idx")
    with pytest.raises(AssertionError):
        megatron().IndexedDataset(f"{tmp_path}/d")
    with pytest.raises(UserError, match="out of order"):
        open_indexed(f"{tmp_path}/d")
