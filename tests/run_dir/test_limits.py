"""What `ulimit` allows is enough for a rank, or it is said before the run directory is made."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.layout.frozen import checkpoint_bytes
from megallama.run_dir.limits import check_limits
from tests.launching import PRETRAIN, arguments, events, execute, pretrain

FILE_LIMIT = 10_000_000
"""Bytes: more than the mean of the two stages, less than the larger."""


@contextmanager
def limited(number: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(number)
    resource.setrlimit(number, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(number, before)


def test_a_limit_of_a_file_below_a_ranks_part_of_a_checkpoint_is_refused() -> None:
    config = load_config("configs/debug.yaml", ["model.hidden_size=256"])
    whole = checkpoint_bytes(config)
    with limited(resource.RLIMIT_FSIZE, whole // 2):
        check_limits(2, whole // 2)
        with pytest.raises(UserError) as refusal:
            check_limits(1, whole)
    assert str(refusal.value) == (
        f"`ulimit -f` allows {whole // 2:,} bytes in one file, and a rank of this run needs {whole:,}; "
        "use `ulimit -f unlimited`, or ask who sets it"
    )


@pytest.mark.parametrize(
    ("number", "letter", "world_size", "least", "more"),
    [
        (resource.RLIMIT_NOFILE, "n", 1, "131", "256"),
        (resource.RLIMIT_NOFILE, "n", 1024, "3,200", "4096"),
        (resource.RLIMIT_AS, "v", 1, "1,073,741,824", "unlimited"),
    ],
)
def test_siblings_are_refused(number: int, letter: str, world_size: int, least: str, more: str) -> None:
    with limited(number, 100), pytest.raises(UserError) as refusal:
        check_limits(world_size, 1)
    assert f"`ulimit -{letter}` allows 100 " in str(refusal.value)
    assert f"needs {least}; use `ulimit -{letter} {more}`" in str(refusal.value)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("-f 0", "`ulimit -f` allows 0 bytes in one file"),
        ("-v 300000", "`ulimit -v` allows 307,200,000 bytes of address"),
    ],
)
def test_a_start_without_room_for_torch_ends_in_a_sentence(
    limit: str, says: str, byte_dataset: str, tmp_path: Path
) -> None:
    """Before torch, which looks for a folder for its own files, or for its libraries' place, fails in its way."""
    words = arguments(byte_dataset, tmp_path / "run")
    # Its words go through a pipe: what it may not write to is a file.
    command = ["sh", "-c", f'(ulimit {limit}; "$@") 2>&1 | cat >&2', "sh", sys.executable, PRETRAIN, *words]
    ended = execute(command, tmp_path)
    assert ended.err.startswith(f"megallama: {says}") and ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_rank_that_writes_more_than_its_share_is_refused_before_it_trains(byte_dataset: str, tmp_path: Path) -> None:
    """Two of three layers are on the first stage."""
    wide = ["model.num_hidden_layers=3", "model.hidden_size=128", "model.intermediate_size=1024"]
    layout = ["parallel.pipeline=2", "train.micro_batch_size=1", "data.sequence_length=32"]
    words = arguments(byte_dataset, tmp_path / "run", *wide, *layout)
    results = pretrain(2, words, plant=small_files)
    assert [code for code, _ in results] == [2, 2]
    assert results[0] == results[1]
    assert results[0][1].startswith(f"megallama: `ulimit -f` allows {FILE_LIMIT:,} bytes in one file")
    assert events(tmp_path / "run", "train") == []


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))


def test_a_checkpoint_has_no_moments_of_what_is_frozen() -> None:
    whole = load_config("configs/debug.yaml")
    frozen = load_config("configs/debug.yaml", ["train.freeze=['model.embed_tokens.weight']"])
    assert checkpoint_bytes(whole) == 12 * 131_520
    assert checkpoint_bytes(whole) - checkpoint_bytes(frozen) == 8 * 257 * 64
