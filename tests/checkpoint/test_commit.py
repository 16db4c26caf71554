"""Nothing is named a checkpoint before all of it has reached the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megallama.checkpoint.format import MANIFEST, STATE, TENSORS, File, why_torn, write_bytes
from megallama.checkpoint.writing.commit import commit


def written(folder: Path) -> dict[str, File]:
    """The files of two ranks."""
    folder.mkdir()
    return {name: write_bytes(folder / name, name.encode()) for name in ("rank_00000.bin", "rank_00001.bin")}


def test_every_file_and_every_name_is_synced_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    sync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        seen.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        seen.append(f"-> {Path(new).name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    unfinished, final = tmp_path / "step_00000003.partial-0", tmp_path / "step_00000003"
    commit(unfinished, final, written(unfinished), {TENSORS: {}, STATE: {}}, 0.0, {})
    files = ["rank_00000.bin", "rank_00001.bin", TENSORS, STATE, MANIFEST]
    assert seen == [*files, unfinished.name, f"-> {final.name}", tmp_path.name]
    assert why_torn(final) is None


@pytest.mark.parametrize("content", [None, b"rank"])
def test_what_this_node_does_not_see_whole_becomes_no_checkpoint(content: bytes | None, tmp_path: Path) -> None:
    """Where the nodes do not share the folder, or not yet."""
    unfinished, final = tmp_path / "step_00000003.partial-0", tmp_path / "step_00000003"
    files = written(unfinished)
    (unfinished / "rank_00001.bin").unlink()
    if content is not None:
        (unfinished / "rank_00001.bin").write_bytes(content)
    with pytest.raises(OSError, match=r"rank_00001\.bin"):
        commit(unfinished, final, files, {TENSORS: {}, STATE: {}}, 0.0, {})
    assert not final.exists()
