"""Where the time of steps goes, and the ranks that others wait for, against the lines of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megallama.cli import app
from megallama.report.picture import draw_picture
from megallama.report.record import Record, read_record
from megallama.run_dir.events import METRICS, read_events, standing_events
from tests.launching import arguments, pretrain
from tests.report.written import PARTS, SECONDS, Writer, long_run, plain_run, train_event

ALL = 10**6


def parts_of(record: Record) -> dict[str, list[float | None]]:
    return {curve.name: list(curve.values) for curve in record.curves if curve.plot == "breakdown"}


def older_run(folder: Path) -> Path:
    """As runs were before they told where the time goes."""
    run = Writer(folder, 3)
    for step in range(1, 4):
        run.train(step)
    run.close()
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    kept = [{key: value for key, value in e.items() if key not in ("breakdown", "slowest")} for e in lines]
    (folder / METRICS).write_text("".join(f"{json.dumps(event)}\n" for event in kept))
    return folder


def test_a_real_run_tells_where_its_time_goes_and_who_works_longest(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", "parallel.tensor=2", "train.steps=8")
    assert pretrain(2, words) == [(0, "")] * 2
    record = read_record(tmp_path / "run", "run", ALL)
    found = parts_of(record)
    assert {"forward", "backward", "tensor", "optimizer"} <= found.keys()
    assert all(value is None or value >= 0 for values in found.values() for value in values)
    told = [e for e in standing_events(tmp_path / "run") if e["event"] == "train" and e.get("breakdown")]
    for at, event in enumerate(told):
        parts = [values[-len(told) :][at] for values in found.values()]
        assert sum(value or 0.0 for value in parts) == pytest.approx(sum(event["breakdown"].values()))
    assert record.ranks.keys() <= {"rank 0", "rank 1"}
    assert all("worked longest in" in words for words in record.ranks.values())


def test_each_part_of_a_step_has_its_curve_but_those_of_nothing(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run", 20)
    train = [event for event in read_events(run / METRICS) if event["event"] == "train"]
    found = parts_of(read_record(run, "run", ALL))
    assert list(found) == [name for name in PARTS if name != "context"]
    for name, values in found.items():
        assert values == [event["breakdown"][name] for event in train]


def test_a_part_that_is_left_out_took_nothing_and_where_nothing_is_told_is_a_gap(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 3)
    run.train(1, breakdown={"forward": 0.1})
    run.train(2, breakdown={})
    run.train(3, breakdown={"forward": 0.1, "new <part>\n": 0.2})
    assert parts_of(read_record(tmp_path / "run", "run", ALL)) == {
        "forward": [0.1, None, 0.1],
        r"new <part>\n": [0.0, None, 0.2],
    }


def test_older_runs_show_nothing_of_it(tmp_path: Path) -> None:
    run = older_run(tmp_path / "run")
    record = read_record(run, "run", ALL)
    assert parts_of(record) == {}
    assert record.ranks == {}
    assert CliRunner().invoke(app, ["report", str(run)], catch_exceptions=False).exit_code == 0
    page = (run / "report.html").read_text()
    assert "Slowest ranks" not in page
    assert '"plot":"breakdown"' not in page
    assert draw_picture([record]) != draw_picture([read_record(plain_run(tmp_path / "newer", 3), "run", ALL)])


@pytest.mark.parametrize(
    "odd",
    [
        {"breakdown": [1], "slowest": {}},
        {"breakdown": {"forward": "x", "data": 10**400, "optimizer": None}, "slowest": [[1, 10**400], [0, "x"]]},
        {"breakdown": {"forward": {}}, "slowest": [["0", 1.0], [1], 5]},
        {"breakdown": None, "slowest": [[0, 0.5]]},
    ],
)
def test_what_no_run_writes_is_left_out(odd: dict[str, Any], tmp_path: Path) -> None:
    run = older_run(tmp_path / "run")
    with (run / METRICS).open("a") as file:
        file.write(json.dumps({"event": "train", **train_event(4, 4), **odd}) + "\n")
        file.write('{"event": "straggler", "step": 4, "seconds": "x"}\n')
    record = read_record(run, "run", ALL)
    assert parts_of(record) == {}
    assert record.ranks == {}


def test_the_ranks_that_are_waited_for_are_told_in_words(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 20)
    for step in range(1, 11):
        run.train(step, slowest=[[0, 0.25], [5, 0.25 + step / 100]] if step > 8 else [[2, 0.5], [0, 0.25]])
    for step in (4, 6, 7):
        run.write("straggler", step=step, rank=5, host="node<7>", seconds=step / 10, share=0.5)
    assert read_record(tmp_path / "run", "run", ALL).ranks == {
        "rank 5 on node<7>": "worked longest in 2 of 10 events, 0.345 s of work in a step; "
        "a straggler in 3, 0.6 s behind",
        "rank 2": "worked longest in 8 of 10 events, 0.5 s of work in a step",
    }


def test_of_many_ranks_the_first_are_told(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 200)
    for step in range(1, 101):
        run.train(step, slowest=[[step % 20 if step > 10 else 7, SECONDS], [99, 0.1]])
    found = read_record(tmp_path / "run", "run", ALL).ranks
    assert len(found) == 8
    assert next(iter(found)) == "rank 7"


def test_two_stragglers_of_a_step_stand_both_until_the_run_goes_back(tmp_path: Path) -> None:
    run = long_run(tmp_path / "run", 1000)
    marks = [mark for mark in read_record(run, "run", ALL).marks if mark.kind == "straggler"]
    assert [(mark.text, mark.stands) for mark in marks] == [
        (
            f"straggler, step 400: rank {rank} on node7, {seconds} s a step behind, 25% of a step",
            True,
        )
        for rank, seconds in ((3, 0.15), (1, 0.13))
    ]
    with (run / METRICS).open("a") as file:
        file.write('{"event": "rollback", "step": 300, "path": "step_00000300", "time": 1800000000.0}\n')
    assert [event for event in standing_events(run) if event["event"] == "straggler"] == []
    marks = [mark for mark in read_record(run, "run", ALL).marks if mark.kind == "straggler"]
    assert [mark.stands for mark in marks] == [False, False]
