"""Going back: newer checkpoints are set aside, a start that says so goes back once, and metrics tell what stands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megallama.checkpoint.commands.cli import checkpoint_app
from megallama.checkpoint.commands.listing import entries
from megallama.checkpoint.format import BEST, LATEST, STATE, complete_checkpoints, step_of
from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.system.lock import RunLock
from megallama.verify.compare import events_of
from tests.checkpoint.damaging import edit, flip, truncate
from tests.launching import CONFIG, arguments, events, pretrain, tree


def words(dataset: str, run_dir: Path, *more: str) -> list[str]:
    schedule = ["train.steps=9", "evaluation.every=2", "checkpoint.every=2", "checkpoint.keep=9"]
    return arguments(dataset, run_dir, *schedule, *more)


@pytest.fixture(scope="module")
def trained(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved after steps 2, 4, 6 and 8 and stands at step 8; tests copy it."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert pretrain(1, words(byte_dataset, run_dir, "train.stop_after=8")) == [(0, "")]
    assert steps(run_dir) == [8, 6, 4, 2]
    return run_dir


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def steps(run_dir: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(run_dir / "checkpoints")]


def call(*given: object) -> str:
    done = CliRunner().invoke(checkpoint_app, ["rollback", *map(str, given)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def refusal(*given: object) -> str:
    with pytest.raises(UserError) as refused:
        CliRunner().invoke(checkpoint_app, ["rollback", *map(str, given)], catch_exceptions=False)
    return str(refused.value)


@pytest.mark.parametrize(
    "asked", ["4", "step_00000004", "{run}/checkpoints/step_00000004", "{run}/checkpoints/step_00000004/"]
)
def test_newer_checkpoints_are_set_aside_whole_and_the_next_start_goes_on_from_there(
    asked: str, byte_dataset: str, run: Path
) -> None:
    folder, before = run / "checkpoints", tree(run / "checkpoints" / "step_00000008")
    said = call(run, asked.format(run=run))
    assert said.splitlines() == [
        "step_00000008 set aside as step_00000008.undone-1",
        "step_00000006 set aside as step_00000006.undone-1",
        f"the next start continues {folder / 'step_00000004'}",
    ]
    assert tree(folder / "step_00000008.undone-1") == before
    assert [(folder / name).read_text() for name in (LATEST, BEST)] == ["step_00000004"] * 2
    assert {entry.path.name: entry.condition for entry in entries(folder)} == {
        "step_00000008.undone-1": "undone",
        "step_00000006.undone-1": "undone",
        "step_00000004": "complete",
        "step_00000002": "complete",
    }
    assert [event["step"] for event in events_of(run, "train")] == [1, 2, 3, 4]
    if asked == "4":
        assert pretrain(1, words(byte_dataset, run, "train.stop_after=7")) == [(0, "")]
        assert [event["step"] for event in events(run, "resume")] == [4]
        assert [event["step"] for event in events(run, "train")] == [*range(1, 9), 5, 6, 7]
        assert [event["step"] for event in events_of(run, "train")] == list(range(1, 8))
        assert steps(run) == [7, 6, 4, 2]
        assert "step_00000006 set aside as step_00000006.undone-2" in call(run, "2")


def test_json_says_what_the_lines_say(run: Path) -> None:
    said = json.loads(call(run, "6", "--json"))
    path = str(run / "checkpoints" / "step_00000006")
    assert said == {"step": 6, "path": path, "set_aside": {"step_00000008": "step_00000008.undone-1"}}
    (event,) = events(run, "rollback")
    assert event == {"event": "rollback", "time": event["time"], **said}


def test_a_run_that_lives_is_not_touched(run: Path) -> None:
    before = tree(run / "checkpoints")
    with RunLock(run):
        assert f"run.dir={run} is in use by process " in refusal(run, "4")
    assert tree(run / "checkpoints") == before
    assert events(run, "rollback") == []


REFUSED: dict[str, tuple[str, str]] = {
    "no such step": ("5", "5 is no checkpoint of {folder}; the nearest of them is of step 4 or 6"),
    "far away": ("500", "500 is no checkpoint of {folder}; the nearest of them is of step 6 or 8"),
    "no step": ("soon", "soon is no checkpoint of {folder}; the nearest of them is of step 2 or 4"),
    "below zero": ("step_-4", "step_-4 is no checkpoint of {folder}; the nearest of them is of step 2 or 4"),
    "other digits": ("४", "४ is no checkpoint of {folder}; the nearest of them is of step 2 or 4"),
    "another run's": ("/r/checkpoints/step_00000004", "/r/checkpoints/step_00000004 is no checkpoint of {folder}; the"),
    "not whole": ("2", "{folder}/step_00000002 is not whole (rank_00000.bin has "),
    "not healthy": (
        "6",
        "{folder}/step_00000006 was not healthy when it was saved, so a start would pass it over; the ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_there_is_no_way_back_nothing_is_touched(name: str, run: Path) -> None:
    asked, sentence = REFUSED[name]
    folder = run / "checkpoints"
    truncate(folder / "step_00000002" / "rank_00000.bin")
    edit(folder / "step_00000006" / STATE, lambda content: content.update(healthy=False))
    before = tree(folder)
    assert refusal(run, asked).startswith(sentence.format(folder=folder))
    assert tree(folder) == before


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none", run / "checkpoints"):
        assert refusal(path, "4") == f"{path} holds no checkpoint; give a run directory such as runs/quickstart"
    call(run, "6")
    assert refusal(run, "8").endswith(
        "and step_00000008.undone-1 was set aside: give it its name again to bring it back"
    )


def test_a_start_goes_back_once_and_then_goes_on(byte_dataset: str, run: Path) -> None:
    """As a job does that is requeued again and again with the words of its first start."""
    start = words(byte_dataset, run, "checkpoint.resume=4")
    assert pretrain(1, [*start, "train.stop_after=5"]) == [(0, "")]
    assert pretrain(1, [*start, "train.stop_after=6"]) == [(0, "")]
    by_path = f"checkpoint.resume={run}/checkpoints/step_00000004"
    assert pretrain(1, [*start, by_path, "train.stop_after=7"]) == [(0, "")]
    assert [event["step"] for event in events(run, "rollback")] == [4]
    assert [event["step"] for event in events(run, "resume")] == [4, 5, 6]
    assert steps(run) == [7, 6, 5, 4, 2]
    again = f"`megallama checkpoint rollback {run} 4` does it again"
    said = f"checkpoint.resume=4 went back at an earlier start, and this one continues; {again}"
    assert events(run, "notice")[0]["text"] == said
    # Another step is another return, and the first is one again after it.
    assert pretrain(1, [*start, "checkpoint.resume=2", "train.stop_after=4"]) == [(0, "")]
    assert pretrain(1, [*start, "train.stop_after=5"]) == [(0, "")]
    assert [event["step"] for event in events(run, "rollback")] == [4, 2, 4]
    assert [event["step"] for event in events_of(run, "train")] == [1, 2, 3, 4, 5]


def test_a_return_to_what_was_not_healthy_is_obeyed(byte_dataset: str, run: Path) -> None:
    edit(run / "checkpoints" / "step_00000006" / STATE, lambda content: content.update(healthy=False))
    assert pretrain(1, words(byte_dataset, run, "checkpoint.resume=6", "train.stop_after=7")) == [(0, "")]
    assert [event["step"] for event in events(run, "resume")] == [6]
    assert "step_00000006, which this start continues, was not healthy" in events(run, "notice")[0]["text"]


Harm = Callable[[Path], Any]
NO_RETURN: dict[str, tuple[str, Harm, str]] = {
    "no such step": (
        "5",
        lambda run: None,
        "checkpoint.resume=5: 5 is no checkpoint of {folder}; the nearest of them is",
    ),
    "another run's": (
        "/r/step_00000004",
        lambda run: None,
        "checkpoint.resume=/r/step_00000004: /r/step_00000004 is no ",
    ),
    "not whole": (
        "4",
        lambda run: truncate(run / "checkpoints" / "step_00000004" / "rank_00000.bin"),
        "checkpoint.resume=4: {folder}/step_00000004 is not whole (rank_00000.bin has ",
    ),
    "damaged": (
        "4",
        lambda run: flip(run / "checkpoints" / "step_00000004" / "rank_00000.bin"),
        "checkpoint.resume names {folder}/step_00000004, which is damaged (rank_00000.bin is damaged); use another",
    ),
    "none": (
        "4",
        lambda run: shutil.rmtree(run / "checkpoints"),
        "checkpoint.resume=4, but {folder} holds no checkpoint; use checkpoint.resume=auto",
    ),
}


@pytest.mark.parametrize("name", NO_RETURN)
def test_a_start_that_cannot_go_back_changes_nothing(name: str, byte_dataset: str, run: Path) -> None:
    asked, harm, sentence = NO_RETURN[name]
    harm(run)
    before = {path: content for path, content in tree(run).items() if path != "lock"}
    ((code, said),) = pretrain(1, words(byte_dataset, run, f"checkpoint.resume={asked}"))
    assert code == 2
    assert said.startswith("megallama: " + sentence.format(folder=run / "checkpoints"))
    assert {path: content for path, content in tree(run).items() if path != "lock"} == before


def test_init_from_a_checkpoint_of_the_run_itself_is_refused_with_the_way_back(byte_dataset: str, run: Path) -> None:
    link = run.with_name("link")
    link.symlink_to(run)
    for folder in (run, link):
        path = folder / "checkpoints" / "step_00000004"
        ((code, said),) = pretrain(1, words(byte_dataset, run, f"checkpoint.init_from={path}"))
        own = f"megallama: checkpoint.init_from={path} is a checkpoint of run.dir itself; use another run.dir to begin "
        assert (code, said) == (2, f"{own}anew with its weights, or checkpoint.resume=4 to go back to it\n")
    assert steps(run) == [8, 6, 4, 2]


def test_init_from_another_run_is_of_the_beginning_and_a_start_says_so(
    byte_dataset: str, run: Path, trained: Path
) -> None:
    path = trained / "checkpoints" / "step_00000002"
    assert pretrain(1, words(byte_dataset, run, f"checkpoint.init_from={path}")) == [(0, "")]
    assert [event["step"] for event in events(run, "resume")] == [8]
    (notice,) = [event["text"] for event in events(run, "notice")]
    assert notice == f"checkpoint.init_from={path} was for the beginning of this run, which goes on now"


@pytest.mark.parametrize(
    ("value", "end"),
    [
        ("nevr", "; did you mean never?"),
        ("1e5", "; write 100000"),
        ("0", ""),
        ("-5", ""),
        ("true", ""),
        ("null", ""),
        ("soon", ""),
    ],
)
def test_a_resume_that_is_neither_word_nor_step_nor_path_is_one_sentence(value: str, end: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(CONFIG, [f"checkpoint.resume={value}"])
    said = str(refused.value)
    assert said.startswith(f"checkpoint.resume={value} is not legal; expected auto, must or never, ")
    assert said.endswith(f" or the path of a checkpoint such as runs/quickstart/checkpoints/step_00000700{end}")
