"""A run directory that cannot be used is refused before anything is written, in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import pytest

from megallama.errors import UserError
from megallama.run_dir.limits import check_run_dir
from megallama.run_dir.outcome import OUTCOME, write_failure, write_outcome
from megallama.system.lock import LOCK, RunLock

NOBODY = 65534


@contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, which may write anywhere."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def closed_to_others(folder: Path) -> bool:
    return not folder.stat().st_mode & 0o077


def test_a_folder_that_is_read_only_is_refused(tmp_path: Path) -> None:
    for folder in takewhile(closed_to_others, (tmp_path, *tmp_path.parents)):
        folder.chmod(0o755)  # root's own temporary folders are
    (tmp_path / "closed").mkdir(mode=0o555)
    with nobody(), pytest.raises(UserError) as refusal:
        check_run_dir(tmp_path / "closed" / "run", 1)
    assert str(refusal.value) == (
        f"run.dir={tmp_path}/closed/run cannot be written: {tmp_path}/closed is read-only for this user; "
        "use another run.dir"
    )


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GB of free disk, and a checkpoint takes [\d.]+ GB; free some, or use"):
        check_run_dir(tmp_path / "run", 10**15)
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_is_no_folder_and_none_can_be_made_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("link", "link/below"):
        with pytest.raises(UserError) as refusal:
            check_run_dir(tmp_path / name, 1)
        assert str(refusal.value) == (
            f"run.dir={tmp_path}/{name} cannot be made: {tmp_path}/link is not a folder; use another run.dir"
        )


def test_a_lock_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UserError) as refusal:
        RunLock(tmp_path)
    assert (
        str(refusal.value)
        == f"run.dir={tmp_path} cannot be written ({tmp_path / LOCK}: Is a directory); use another run.dir"
    )


def test_a_rank_of_the_start_before_does_not_mark_this_one_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_outcome(tmp_path, "running", 3, "")
    before = (tmp_path / OUTCOME).read_bytes()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    write_failure(tmp_path, "of the start before", 5)
    assert (tmp_path / OUTCOME).read_bytes() == before
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_failure(tmp_path, "of this one", 5)
    assert b'"failed"' in (tmp_path / OUTCOME).read_bytes()
