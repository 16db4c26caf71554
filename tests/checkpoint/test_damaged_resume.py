"""A run whose checkpoints are damaged goes on from the newest whole one and says so, or refuses; never from nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megallama.checkpoint.format import LATEST, MANIFEST, STATE, TENSORS, complete_checkpoints
from megallama.checkpoint.state import DataIdentity, TrainState, read_saved, state_document
from megallama.checkpoint.writing.commit import Retention, apply_retention, best_of
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.generation.load import load_model
from megallama.parallel.spawn import RankFailedError, run_ranks
from megallama.run_dir.outcome import write_outcome
from megallama.system.lock import LOCK
from megallama.verify.compare import events_of
from megallama.verify.verify import train_rank, write_dataset
from tests.checkpoint.damaging import CHECKPOINT, edit, edit_manifest, flip, truncate
from tests.checkpoint.test_store import losses, settings, stopped_after
from tests.launching import tree

STOPPED = 3
Harm = Callable[[Path], object]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def stopped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved after steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run_ranks(train_rank, 1, stopped_after(settings(folder, dataset, "zero1"), STOPPED), None)
    return folder


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The losses of the same run, never stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(train_rank, 1, settings(folder, dataset, "zero1"), None)
    return losses(folder)


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def newest(run: Path) -> Path:
    return run / "checkpoints" / f"step_{STOPPED:08d}"


def resumed(run: Path) -> list[int]:
    return [event["step"] for event in events_of(run, "resume")]


def unlocked(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without the lock, in which each start writes its process."""
    return {name: content for name, content in files.items() if name != LOCK}


def refusal(config: RunConfig) -> str:
    """The sentence with which every rank refuses to start."""
    with pytest.raises(RankFailedError) as failed:
        run_ranks(train_rank, 1, config, None)
    kind, _, sentence = str(failed.value).strip().splitlines()[-1].partition(": ")
    assert kind in ("megallama.errors.UserError", "megallama.errors.SharedError"), failed.value
    return sentence


DAMAGE: dict[str, tuple[Harm, str]] = {
    "flipped bit in tensors": (lambda path: flip(path / "rank_00000.bin"), "rank_00000.bin is damaged"),
    "flipped bit in names": (lambda path: flip(path / TENSORS), "tensors.json is damaged"),
    "no JSON in the state": (lambda path: flip(path / STATE, at=0), "state.json is damaged"),
    "another model in the state": (
        # 64 -> 65: what a bit makes of hidden_size is another model's, and still JSON.
        lambda path: flip(path / STATE, at=(path / STATE).read_bytes().index(b'"hidden_size": 64') + 16),
        "state.json is damaged",
    ),
    "flipped bit in the manifest": (lambda path: flip(path / MANIFEST), "manifest.json is damaged"),
    "truncated file": (lambda path: truncate(path / "rank_00000.bin"), "rank_00000.bin has"),
    "missing file": (lambda path: (path / "rank_00000.bin").unlink(), "rank_00000.bin is missing"),
    "empty manifest": (lambda path: (path / MANIFEST).write_bytes(b""), "manifest.json is damaged"),
    "hole": (
        lambda path: edit(path / TENSORS, lambda content: content["tensors"]["lm_head.weight"]["chunks"].pop()),
        "tensors.json has element [0, 0] of lm_head.weight in no chunk",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    name: str, run: Path, dataset: Path, undisturbed: dict[int, str]
) -> None:
    harm, reason = DAMAGE[name]
    harm(newest(run))
    bad = tree(newest(run))
    run_ranks(train_rank, 1, settings(run, dataset, "zero1", resume="must"), None)
    assert resumed(run) == [STOPPED - 1]
    (notice,) = [event["text"] for event in events_of(run, "notice")]
    assert f"step_{STOPPED:08d}" in notice
    assert reason in notice
    assert f"set aside as step_{STOPPED:08d}.torn-1" in notice
    assert tree(run / "checkpoints" / f"step_{STOPPED:08d}.torn-1") == bad
    assert losses(run) == undisturbed
    assert [path.name for path in complete_checkpoints(run / "checkpoints")][:3] == [
        f"step_{step:08d}" for step in (5, 4, 3)
    ]


def test_what_another_rank_finds_damaged_is_passed_over_by_all(run: Path, dataset: Path) -> None:
    """Of rank_00000.bin, state.json and tensors.json the first rank reads the outer two, the second the middle one."""
    flip(newest(run) / STATE)
    flip(newest(run) / "rank_00000.bin")
    run_ranks(train_rank, 2, stopped_after(settings(run, dataset, "dp2"), STOPPED), None)
    assert resumed(run) == [STOPPED - 1]
    (notice,) = [event["text"] for event in events_of(run, "notice")]
    assert "rank_00000.bin is damaged; state.json is damaged; set aside" in notice


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize("harm", [flip, truncate])
def test_a_run_whose_checkpoints_are_all_damaged_refuses_again_and_again(
    harm: Harm, resume: str, run: Path, dataset: Path
) -> None:
    for path in complete_checkpoints(run / "checkpoints"):
        harm(path / "rank_00000.bin")
    (run / "checkpoints" / LATEST).unlink()
    before = tree(run)
    for _ in range(2):
        sentence = refusal(settings(run, dataset, "zero1", resume=resume))
        assert f"{run / 'checkpoints'} has held checkpoints and none is whole now (step_00000003: " in sentence
        assert "step_00000001: rank_00000.bin" in sentence
        assert "put one back, or start over with checkpoint.resume=never, which deletes nothing" in sentence
        assert unlocked(tree(run)) == unlocked(before)


def test_a_refusal_leaves_what_a_killed_run_left_as_it_was(run: Path, dataset: Path) -> None:
    """Of three checkpoints one is cut off and two have a flipped bit; of a fourth there is the beginning."""
    write_outcome(run, "running", 0, "")
    cut_off, *others = complete_checkpoints(run / "checkpoints")
    truncate(cut_off / "rank_00000.bin")
    for path in others:
        flip(path / "rank_00000.bin")
    shutil.copytree(others[0], run / "checkpoints" / "step_00000004.partial-0123abcd")
    before = tree(run)
    sentence = refusal(settings(run, dataset, "zero1"))
    for found in ("step_00000003: rank_00000.bin has", "step_00000002: rank_00000.bin is damaged", "step_00000001: "):
        assert found in sentence
    assert unlocked(tree(run)) == unlocked(before)


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize("content", [b"step_00000009", b"", b"\xff\xfe"])
def test_a_name_in_latest_of_what_is_gone_is_no_fresh_start(
    content: bytes, resume: str, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LATEST).write_bytes(content)
    sentence = refusal(settings(tmp_path, dataset, "zero1", resume=resume))
    assert "has held checkpoints and none is whole now (latest names " in sentence
    assert "which is not there" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("content", ["step_00000009", "", "step_00000001", "../elsewhere", None])
def test_a_whole_checkpoint_is_continued_whatever_latest_says(content: str | None, run: Path, dataset: Path) -> None:
    latest = run / "checkpoints" / LATEST
    latest.unlink() if content is None else latest.write_text(content)
    run_ranks(train_rank, 1, stopped_after(settings(run, dataset, "zero1", resume="must"), STOPPED + 1), None)
    assert resumed(run) == [STOPPED]
    assert latest.read_text() == f"step_{STOPPED + 1:08d}"


def test_a_newer_format_is_refused_by_one_sentence_and_left_alone(run: Path, dataset: Path) -> None:
    edit_manifest(newest(run), lambda tree: tree.update(format=2))
    before = tree(run)
    sentence = refusal(settings(run, dataset, "zero1"))
    assert sentence == (
        f"{newest(run)} is a checkpoint of format 2, and this megallama reads up to 1; use a newer megallama"
    )
    assert tree(run) == before


def test_a_newer_format_in_the_folder_ends_no_save_and_costs_no_checkpoint(tmp_path: Path) -> None:
    paths = [shutil.copytree(CHECKPOINT, tmp_path / f"step_{step:08d}") for step in (1, 2, 3)]
    edit_manifest(paths[1], lambda tree: tree.update(format=2))
    (said,) = apply_retention(tmp_path, Retention(keep=1))
    assert said.startswith(f"{paths[1]} is a checkpoint of format 2, ")
    assert all(path.is_dir() for path in paths)


@pytest.mark.parametrize(("name", "at"), [("rank_00000.bin", None), (STATE, 0)])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_damaged_weights_to_begin_with_are_refused_before_anything_is_written(
    resume: str, name: str, at: int | None, run: Path, stopped: Path, dataset: Path, tmp_path: Path
) -> None:
    """Also where a run starts over: what is there keeps its name, or the next start would begin at step 0."""
    flip(newest(run) / name, at)
    folder = tmp_path / "new"
    if resume == "never":
        shutil.copytree(stopped, folder)
    before = tree(tmp_path)
    sentence = refusal(settings(folder, dataset, "zero1", init_from=str(newest(run)), resume=resume))
    assert sentence == f"checkpoint.init_from={newest(run)} is damaged ({name} is damaged); use another checkpoint"
    assert tree(tmp_path) == before
    assert folder.exists() == (resume == "never")


def test_text_of_damaged_weights_is_refused(tmp_path: Path) -> None:
    """Also where the damage makes the state another model's, or no JSON."""
    (tmp_path / "config.yaml").touch()
    path = shutil.copytree(CHECKPOINT, tmp_path / "checkpoints" / CHECKPOINT.name)
    flip(path / STATE, at=0)
    with pytest.raises(UserError, match=r"is damaged \(state.json is damaged\); use another"):
        load_model(tmp_path)
    shutil.copy(CHECKPOINT / STATE, path / STATE)
    edit(path / TENSORS, lambda content: content["tensors"]["lm_head.weight"]["chunks"].pop())
    with pytest.raises(UserError, match=r"is damaged \(tensors.json has element .* in no chunk\); use another"):
        load_model(tmp_path)


def test_a_damaged_checkpoint_is_never_the_best_and_ends_no_save(tmp_path: Path) -> None:
    paths = [shutil.copytree(CHECKPOINT, tmp_path / f"step_{step:08d}") for step in (1, 2, 3, 4)]
    for path, loss in zip(paths, (2.0, 1.0, 0.0, None), strict=True):
        edit(path / STATE, lambda content, loss=loss: content["state"].update(validation_loss=loss))
    assert best_of(paths) == paths[2]
    flip(paths[2] / STATE, at=0)
    assert best_of(paths) == paths[1]
    flip(paths[1] / STATE, at=(paths[1] / STATE).read_bytes().index(b"1.0"))
    assert json.loads((paths[1] / STATE).read_bytes())["state"]["validation_loss"] == 0.0
    assert best_of(paths) == paths[0]
    truncate(paths[0] / STATE)
    assert best_of(paths) is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_null_in_the_state(loss: float) -> None:
    model = read_saved(CHECKPOINT).model
    assert state_document(TrainState(), loss, False, DataIdentity("", 0), model, {})["loss"] is None
    assert state_document(TrainState(), 1.5, True, DataIdentity("", 0), model, {})["loss"] == 1.5
