"""A run without enough memory: one sentence with what was predicted and what would take less, for real on a CPU."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import pytest
import torch

import megallama.train.loop
from megallama.checkpoint.format import complete_checkpoints
from megallama.checkpoint.writing.saver import Saver
from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.layout.topology import AXES, Topology
from megallama.parallel.clock import Clock
from megallama.parallel.mesh import ALONE, ParallelMesh
from megallama.plan.memory.ledger import memory_rows
from megallama.plan.search.changes import nearest_change
from megallama.train.out_of_memory import explanation, memory_explained, out_of_memory
from tests.launching import CONFIG, ROOT, arguments, pretrain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LARGE = ["model.hidden_size=1024", "model.intermediate_size=4096", "model.num_hidden_layers=4"]


def limit_memory(more: int) -> None:
    """Leave this process that many bytes of addresses."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))


def plant_little_memory() -> None:
    limit_memory(1 << 29)


def plant_less_after_the_second_step() -> None:
    """The third step finds no memory, while the save of the second is still being written."""
    train_step, save, calls = megallama.train.loop.train_step, Saver._save, []

    def slow_save(saver: Saver, *arguments: object) -> object:
        time.sleep(1.0)
        return save(saver, *arguments)  # type: ignore[arg-type]

    def step(*arguments: object) -> object:
        calls.append(None)
        if len(calls) == 3:
            limit_memory(1 << 28)  # a thread that watches the end still starts
            torch.ones(1 << 28)
        return train_step(*arguments)  # type: ignore[arg-type]

    Saver._save = slow_save  # type: ignore[assignment,method-assign]
    megallama.train.loop.train_step = step  # type: ignore[assignment]


def check_ending(run_dir: Path, code: int, stderr: str) -> None:
    assert code == 2
    assert stderr.startswith("megallama: no memory is left on rank 0, for which ")
    assert stderr.count("\n") == 1
    assert "fp32 Adam moments" in stderr
    outcome = json.loads((run_dir / "outcome.json").read_text())
    assert outcome["status"] == "failed"
    assert f"megallama: {outcome['reason']}\n" == stderr


def test_a_model_that_does_not_fit_ends_in_one_sentence(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", *LARGE)
    ((code, stderr),) = pretrain(1, words, plant=plant_little_memory)
    check_ending(tmp_path / "run", code, stderr)


def test_a_save_in_flight_outlives_a_step_without_memory(byte_dataset: str, tmp_path: Path) -> None:
    more = ["checkpoint.every=2", "evaluation.every=0"]
    words = arguments(byte_dataset, tmp_path / "run", *more)
    ((code, stderr),) = pretrain(1, words, plant=plant_less_after_the_second_step)
    check_ending(tmp_path / "run", code, stderr)
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000002"]


def test_the_sentence_has_the_largest_terms_of_the_rank_and_a_change_that_the_ledger_confirms() -> None:
    config = load_config(ROOT / "configs" / "7b.yaml")
    sentence = explanation(config, 128, 5, 1)
    rows = sorted(memory_rows(config, 16)[1], key=lambda row: row.size)
    assert sentence.startswith("no memory is left on rank 5, for which ")
    assert [row.name for row in rows if row.name in sentence] == [row.name for row in rows[-3:]]
    change = nearest_change(config, 128)
    assert change is not None
    assert f"use {change.words}, with which the fullest rank needs {change.size / 2**30:.2f} GiB" in sentence
    changed = memory_rows(load_config(ROOT / "configs" / "7b.yaml", [change.words]), 16)
    now = max(sum(row.size for row in rows) for rows in memory_rows(config, 16))
    assert change.size == max(sum(row.size for row in rows) for rows in changed) <= 0.9 * now


def test_the_sentence_in_the_documents_is_that_of_its_run() -> None:
    overrides = ["parallel.tensor=1", "parallel.pipeline=1", "train.micro_batch_size=8"]
    config = load_config(ROOT / "configs" / "7b.yaml", overrides)
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert f"\nmegallama: {explanation(config, 8, 0, 0)}\n" in page


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        (["train.micro_batch_size=6", "train.global_batch_size=6"], 1, "train.micro_batch_size=3"),
        (["train.micro_batch_size=1", "model.num_hidden_layers=32"], 1, "train.recompute=full"),
        (["train.micro_batch_size=1", "train.recompute=full", "model.hidden_size=1024"], 8, "zero.stage=2"),
        (["train.micro_batch_size=1", "train.recompute=full", "zero.stage=3"], 2, "parallel.tensor=2"),
        (["train.micro_batch_size=1", "train.recompute=full", "zero.stage=3"], 1, "zero.stage=1"),
        (["train.micro_batch_size=1", "train.recompute=full"], 1, None),
    ],
)
def test_the_cheapest_change_that_helps_is_named(overrides: list[str], ranks: int, words: str | None) -> None:
    config = load_config(CONFIG, ["train.device=cpu", "zero.bucket_elements=1000", *overrides])
    change = nearest_change(config, ranks)
    assert (change.words if change else None) == words


def test_only_the_memory_of_the_device_counts() -> None:
    on_cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")
    wrapped = RuntimeError("failed to run forward")
    wrapped.__cause__ = on_gpu
    assert out_of_memory(on_cpu, CPU) and out_of_memory(MemoryError(), CPU)
    assert out_of_memory(on_gpu, CUDA) and out_of_memory(wrapped, CUDA)
    assert not out_of_memory(on_cpu, CUDA) and not out_of_memory(MemoryError(), CUDA)
    assert not out_of_memory(RuntimeError("shapes differ"), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is a snapshot: tests/test_cuda.py")
def test_a_snapshot_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    config = load_config(CONFIG, [f"run.dir={tmp_path}", "train.device=cuda"])
    axes = {name: ALONE for name in AXES}
    clock = Clock(torch.device("cpu"))
    mesh = ParallelMesh(Topology(), 0, CUDA, axes, ALONE, ALONE, ALONE, (), clock)
    with pytest.raises(UserError) as error, memory_explained(config, mesh):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")
    assert str(error.value) == explanation(config, 1, 0, 0)
    assert list(tmp_path.glob("memory/*")) == []
