"""What slurm/run.sh is told: may a start train, and what comes after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megallama.checkpoint.format import STATE, folder_name
from megallama.cli import app
from megallama.cluster.job import main
from megallama.cluster.starts import Starts, read_starts, write_starts
from megallama.errors import UserError
from megallama.run_dir.outcome import write_outcome
from tests.checkpoint.damaging import edit
from tests.launching import CONFIG


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")


def begin(run_dir: Path, *more: str) -> None:
    main(["begin", "--nodes", "1", "--ranks-per-node", "1", CONFIG, f"run.dir={run_dir}", *more])


def after(run_dir: Path, *more: str) -> None:
    main(["after", "--code", "9", *more, str(run_dir)])


def test_failures_are_counted_until_a_checkpoint_is_newer(
    tmp_path: Path, short_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for count in (1, 2, 3):
        begin(tmp_path, "train.steps=60")
        assert capsys.readouterr().out == f"{tmp_path}\n"
        assert read_starts(tmp_path) == Starts("7", 0, count, count - 1)
        after(tmp_path)
        assert capsys.readouterr().out == ("end 9\n" if count == 3 else "requeue\n")
    with pytest.raises(SystemExit, match="2"):
        begin(tmp_path, "train.steps=60")
    assert "job 7 was started 4 times, failed 3 times, and made no checkpoint after step 0" in capsys.readouterr().err
    shutil.copytree(short_run / "checkpoints", tmp_path / "checkpoints")
    begin(tmp_path, "train.steps=60")
    assert read_starts(tmp_path) == Starts("7", 40, 1)


def test_a_run_directory_that_srun_would_misspell_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        begin(tmp_path / "a\\b")
    assert (
        "a\\b holds a backslash, which Slurm takes in no log's name; use another run.dir\n" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_starts_that_slurm_ends_are_no_failures_but_do_not_go_on_for_ever(tmp_path: Path) -> None:
    for count in range(1, 21):
        begin(tmp_path)
        assert read_starts(tmp_path) == Starts("7", 0, count)
    with pytest.raises(SystemExit, match="2"):
        begin(tmp_path)


def test_another_job_counts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_starts(tmp_path, Starts("6", 0, 3, 3))
    begin(tmp_path)
    assert read_starts(tmp_path) == Starts("7", 0, 1)


def test_a_run_that_is_done_is_not_started(short_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(short_run, "train.steps=40")
    found = capsys.readouterr()
    assert found.out == ""
    assert "has done all 40 steps" in found.err


def test_a_run_that_is_to_go_back_is_started_though_all_its_steps_are_done(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a person, or since what it saved last is not healthy."""
    shutil.copytree(short_run / "checkpoints", tmp_path / "checkpoints")
    begin(tmp_path, "train.steps=40", "checkpoint.resume=40")
    assert capsys.readouterr().out == f"{tmp_path}\n"
    edit(tmp_path / "checkpoints" / folder_name(40) / STATE, lambda state: state.update(healthy=False))
    begin(tmp_path, "train.steps=40")
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_a_job_that_would_begin_anew_at_each_start_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        begin(tmp_path, "checkpoint.resume=never")
    assert capsys.readouterr().err == (
        "megallama: checkpoint.resume=never would begin the run anew each time that Slurm starts the job again; use "
        f"another run.dir than {tmp_path}, or move what is there away\n"
    )
    launched = CliRunner().invoke(
        app, ["launch", CONFIG, f"run.dir={tmp_path}", "checkpoint.resume=never", "--per-node", "1"]
    )
    assert isinstance(launched.exception, UserError)


def test_a_config_that_does_not_fit_the_allocation_names_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["begin", "--nodes", "3", "--ranks-per-node", "1", CONFIG, f"run.dir={tmp_path}", "parallel.tensor=2"])
    said = capsys.readouterr().err
    assert said.startswith("megallama: 3 nodes of 1 ranks: a world size of 3 is not a multiple of parallel.tensor")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "reason", "signalled", "answer"),
    [
        ("done", "done", False, "end 0"),
        ("stopped", "stopped by train.stop_after", False, "end 0"),
        ("requeue", "stopped by a signal", False, "requeue"),
        ("requeue", "stopped by train.max_minutes", False, "requeue"),
        ("requeue", "stopped by the file STOP", True, "requeue"),
        ("requeue", "stopped by the file STOP", False, "end 0"),  # a person's
        ("failed", "rank 1: RuntimeError", False, "requeue"),
        ("running", "", False, "requeue"),  # killed
    ],
)
def test_what_comes_after_a_start(
    status: str,
    reason: str,
    signalled: bool,
    answer: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begin(tmp_path)
    capsys.readouterr()
    write_outcome(tmp_path, status, 3, reason)  # type: ignore[arg-type]
    after(tmp_path, *(["--signalled"] if signalled else []))
    assert capsys.readouterr().out == f"{answer}\n"


def test_the_last_start_without_a_checkpoint_ends_the_job_with_its_code(
    tmp_path: Path, short_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_starts(tmp_path, Starts("7", 0, 3, 2))
    write_outcome(tmp_path, "failed", 0, "rank 1: the disk is on fire")
    after(tmp_path)
    found = capsys.readouterr()
    assert found.out == "end 9\n"
    assert found.err.endswith("the last one: rank 1: the disk is on fire\n")
    shutil.copytree(short_run / "checkpoints", tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints" / folder_name(40)).is_dir()
    after(tmp_path)
    assert capsys.readouterr().out == "requeue\n", "it did get further"


def test_the_outcome_of_another_start_says_nothing_of_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_outcome(tmp_path, "done", 3, "done")
    found = json.loads((tmp_path / "outcome.json").read_text())
    (tmp_path / "outcome.json").write_text(json.dumps(found | {"restart": 0}))
    write_starts(tmp_path, Starts("7", 0, 1))
    after(tmp_path)
    assert capsys.readouterr().out == "requeue\n"
