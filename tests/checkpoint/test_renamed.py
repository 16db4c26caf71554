"""Folders of checkpoints that people rename, copy and link: a checkpoint is of the step that its manifest says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megallama.checkpoint.commands.listing import entries
from megallama.checkpoint.format import (
    LATEST,
    STATE,
    TENSORS,
    complete_checkpoints,
    folder_name,
    holds,
    read_manifest,
    step_of,
    write_bytes,
)
from megallama.checkpoint.reading.rollback import find
from megallama.checkpoint.writing.commit import Retention, apply_retention, commit, make_way, quarantine
from megallama.cluster.starts import newest_step
from tests.checkpoint.damaging import CHECKPOINT, copy_as, truncate
from tests.launching import arguments, events, pretrain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of the steps 1 to 3."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        copy_as(CHECKPOINT, step, folder)
    return folder


def steps(folder: Path) -> dict[str, int]:
    """The step of each whole checkpoint, by its name, newest first."""
    return {path.name: step_of(path) for path in complete_checkpoints(folder)}


def save(folder: Path, step: int) -> Path:
    """A save, as rank 0's writer commits it."""
    unfinished = folder / f"{folder_name(step)}.partial-0"
    unfinished.mkdir()
    written = {"rank_00000.bin": write_bytes(unfinished / "rank_00000.bin", b"numbers")}
    commit(unfinished, folder / folder_name(step), written, {TENSORS: {}, STATE: {}}, 5.0, {})
    return folder / folder_name(step)


def test_a_renamed_checkpoint_ranks_by_its_step_everywhere(folder: Path) -> None:
    (folder / "step_00000001").rename(folder / "step_00001000")
    assert list(steps(folder).items()) == [("step_00000003", 3), ("step_00000002", 2), ("step_00001000", 1)]
    assert [(entry.path.name, entry.step) for entry in entries(folder)] == list(steps(folder).items())
    assert newest_step(folder.parent) == 3
    assert [find(folder, asked).name for asked in (1, "step_00001000")] == ["step_00001000"] * 2
    assert apply_retention(folder, Retention(keep=2)) == []
    assert steps(folder) == {"step_00000003": 3, "step_00000002": 2}
    assert (folder / LATEST).read_text() == "step_00000003"


def test_of_two_copies_the_one_with_the_name_of_its_step_is_taken(folder: Path) -> None:
    shutil.copytree(folder / "step_00000003", folder / "step_00000002.5")  # no name of a checkpoint
    shutil.copytree(folder / "step_00000003", folder / "step_00000009")
    assert list(steps(folder)) == ["step_00000003", "step_00000009", "step_00000002", "step_00000001"]
    assert find(folder, 3).name == "step_00000003"


def test_a_save_moves_what_has_its_name_to_the_name_of_its_own_step(folder: Path) -> None:
    (folder / "step_00000001").rename(folder / "step_00000020")
    saved = save(folder, 20)
    assert holds(saved, 20, 5.0)
    assert steps(folder)["step_00000001"] == 1


def test_a_save_sets_aside_what_has_its_name_and_no_other_place(folder: Path) -> None:
    shutil.copytree(folder / "step_00000001", folder / "step_00000020")
    shutil.copytree(folder / "step_00000001", folder / "step_00000021")
    truncate(folder / "step_00000021" / "rank_00000.bin")
    (folder / "step_00000022").write_text("a note")
    (folder / "step_00000023").symlink_to(folder / "nowhere")
    assert all(holds(save(folder, step), step, 5.0) for step in (20, 21, 22, 23))
    assert read_manifest(folder / "step_00000020.undone-1").step == 1
    assert (folder / "step_00000021.torn-1").is_dir()
    assert (folder / "step_00000022.torn-1").read_text() == "a note"
    assert (folder / "step_00000023.torn-1").is_symlink()


def test_another_checkpoint_in_its_place_is_no_save(folder: Path) -> None:
    place = folder / "step_00000003"
    manifest = read_manifest(place)
    assert holds(place, 3, manifest.saved)
    assert not holds(place, 3, manifest.saved + 1)
    assert not holds(place, 4, manifest.saved)
    assert not holds(folder / "step_00000004", 4, manifest.saved)


def test_a_checkpoint_of_a_newer_format_is_not_moved(folder: Path) -> None:
    manifest = folder / "step_00000003" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(FileExistsError, match="step_00000003"):
        make_way(folder / "step_00000003")
    assert manifest.exists()


def test_of_a_linked_checkpoint_the_link_is_deleted_and_what_it_leads_to_stays(folder: Path, tmp_path: Path) -> None:
    elsewhere = (folder / "step_00000001").rename(tmp_path / "elsewhere")
    (folder / "step_00000001").symlink_to(elsewhere)
    assert steps(folder)["step_00000001"] == 1
    assert apply_retention(folder, Retention(keep=2)) == []
    assert steps(folder) == {"step_00000003": 3, "step_00000002": 2}
    assert read_manifest(elsewhere).step == 1
    (folder / "step_00000001.dropped").symlink_to(elsewhere)
    assert list(quarantine(folder, {})) == ["step_00000001.dropped is deleted now"]
    assert not (folder / "step_00000001.dropped").is_symlink()
    assert read_manifest(elsewhere).step == 1


def test_a_run_goes_on_from_a_renamed_checkpoint_and_comes_to_its_end(byte_dataset: str, tmp_path: Path) -> None:
    """`step_2` renamed to `step_1000`, and `step_1` to the name of a step that is yet to come."""
    run = tmp_path / "run"
    words = arguments(byte_dataset, run, "evaluation.every=0", "checkpoint.every=1", "checkpoint.keep=9")
    pretrain(1, [*words, "train.stop_after=2"])
    (run / "checkpoints" / "step_00000002").rename(run / "checkpoints" / "step_00001000")
    (run / "checkpoints" / "step_00000001").rename(run / "checkpoints" / "step_00000003")
    for _ in range(2):
        assert pretrain(1, words) == [(0, "")]
    assert [event["step"] for event in events(run, "train")] == [1, 2, 3, 4]
    assert [event["step"] for event in events(run, "resume")] == [2, 4]
    assert events(run, "checkpoint_failed") == []
    moved = "step_00000003 was in the way of the checkpoint of that step, and is step_00000001 now"
    assert moved in [event["text"] for event in events(run, "notice")]
    assert steps(run / "checkpoints") == {
        f"step_{name:08d}": step for name, step in ((4, 4), (3, 3), (1000, 2), (1, 1))
    }
    assert newest_step(run) == 4
    assert list((run / "checkpoints").glob("*.partial-*")) == []
