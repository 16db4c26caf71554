"""Small corpora and datasets for the tests of the data package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megallama.data.indexed import IndexedWriter, token_dtype

DOCUMENTS = [
    "the quick brown fox jumps over the lazy dog\n" * 3,
    "naïve café — 日本語 🙂 \u0000 tab\there\r\n",
    "<|endoftext|> is plain text here",
    *(f"def function_{i}(x):\n    return x + {i}\n" for i in range(40)),
]


@pytest.fixture
def documents() -> list[str]:
    return list(DOCUMENTS)


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., str]:
    """Write a dataset without a sidecar, as Megatron-LM would: one array of ids per document."""

    def write(name: str, documents: list[list[int]], vocab_size: int = 1000) -> str:
        prefix = str(tmp_path / name)
        writer = IndexedWriter(prefix, token_dtype(vocab_size))
        for ids in documents:
            writer.add(np.array(ids, token_dtype(vocab_size)), np.array([len(ids)], "<i4"))
        writer.close()
        return prefix

    return write
