"""What many test files train on: one small dataset, one short run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

# Before torch is imported, and for all that is started: of two files at a time, each with a thread for every processor,
# threads wait for each other in every small kernel. Some tests would take twenty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from megallama.corpus.building.build import build_dataset
from megallama.data.indexed import IndexedWriter, token_dtype
from tests.launching import arguments, pretrain

DOCUMENTS = [
    "the quick brown fox jumps over the lazy dog\n" * 3,
    "naïve café — 日本語 🙂 \u0000 tab\there\r\n",
    "<|endoftext|> is plain text here",
    *(f"def function_{i}(x):\n    return x + {i}\n" for i in range(40)),
]

# What `nohup` and a shell in the background ignore, every process that a test starts would ignore as well.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def byte_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a dataset of 60 short documents of bytes, about 7,000 tokens."""
    folder = tmp_path_factory.mktemp("dataset")
    lines = [
        json.dumps({"text": f"document {number} is about the number {number * number}. " * 3}) for number in range(60)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines))
    build_dataset([str(folder / "text.jsonl")], str(folder / "corpus"), "bytes", workers=1)
    return str(folder / "corpus")


@pytest.fixture(scope="session")
def short_run(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps that has learnt a little; tests only read it."""
    run_dir = tmp_path_factory.mktemp("short") / "run"
    more = ["train.steps=40", "optimizer.lr=1e-2", "evaluation.every=0", "checkpoint.every=0"]
    assert pretrain(1, arguments(byte_dataset, run_dir, *more)) == [(0, "")]
    return run_dir


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
