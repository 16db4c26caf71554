"""Curves, marks and goodput of runs, against the lines of their files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megallama.errors import UserError
from megallama.report.curves import Curve
from megallama.report.marks import MARKS, MOST_MARKS
from megallama.report.picture import draw_picture
from megallama.report.record import Record, read_record
from megallama.report.thinning import thinned
from megallama.run_dir.events import METRICS, read_events
from tests.report.written import GIB, SECONDS, TOKENS, Writer, long_run, plain_run, train_event

ALL = 10**6


def curve(record: Record, plot: str, name: str = "") -> Curve:
    (found,) = [each for each in record.curves if each.plot == plot and name in ("", each.name)]
    return found


def test_thinning_keeps_the_extremes_of_every_part_and_both_ends() -> None:
    values: list[float | None] = [math.sin(i * i) for i in range(10_000)]
    values[5017], values[7777] = 9.0, -9.0
    kept = thinned(values, 500)
    assert kept == sorted(set(kept))
    assert len(kept) <= 2 * 500 + 2
    assert {0, 5017, 7777, 9999} <= set(kept)
    for begin in range(0, 10_000, 20):
        part = [values[i] for i in kept if begin <= i < begin + 20]
        assert max(part) == max(values[begin : begin + 20])
        assert min(part) == min(values[begin : begin + 20])


def test_thinning_keeps_gaps_and_what_is_short() -> None:
    values: list[float | None] = [float(i) for i in range(1000)]
    values[333] = None
    assert 333 in thinned(values, 10)
    assert thinned(values[:20], 10) == list(range(20))
    assert thinned([None] * 100, 10)[0] == 0
    assert thinned([], 10) == []


def test_curves_are_the_numbers_of_the_file(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run", 20, ["train", "validation", "web"])
    record = read_record(run, "run", ALL)
    train = [event for event in read_events(run / METRICS) if event["event"] == "train"]
    for plot, name, key, factor in (
        ("loss", "train", "loss", 1),
        ("lr", "", "lr", 1),
        ("grad_norm", "", "grad_norm", 1),
        ("tokens_per_second", "", "tokens_per_second", 1),
        ("mfu", "mfu, attention over the whole square", "mfu", 100),
        ("mfu", "mfu_causal, over the positions seen", "mfu_causal", 100),
        ("memory", "measured, rank 0", "peak_memory_bytes", 1 / GIB),
    ):
        found = curve(record, plot, name)
        assert found.values == [event[key] * factor for event in train]
        assert [where.step for where in found.positions] == list(range(1, 21))
        assert [where.tokens for where in found.positions] == [step * TOKENS for step in range(1, 21)]
    assert curve(record, "perplexity", "train").values == [math.exp(event["loss"]) for event in train]
    for split, name in (("train", "train, evaluated"), ("validation", "validation"), ("web", "web")):
        found = curve(record, "loss", name)
        told = [e["loss"] for e in read_events(run / METRICS) if e["event"] == "eval" and e["split"] == split]
        assert found.values == told
        assert [(where.step, where.tokens) for where in found.positions] == [(0, 0), (20, 20 * TOKENS)]


def test_only_what_stands_is_drawn(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 10)
    for step in range(1, 9):
        run.train(step, loss=99.0 if step > 5 else 5.0)
    run.checkpoint(8)
    run.start(5, 1)
    for step in range(6, 11):
        run.train(step, loss=5.0)
    record = read_record(tmp_path / "run", "run", ALL)
    assert curve(record, "loss").values == [5.0] * 10
    assert [(mark.kind, mark.position.step, mark.stands) for mark in record.marks] == [
        ("resume", 5, True),
        ("checkpoint", 8, False),
    ]
    assert record.marks[1].text == "checkpoint, step 8: step_00000008 (undone)"
    assert record.facts["restarts"] == "1"


def test_a_number_that_was_not_finite_is_a_gap(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 3)
    run.train(1)
    run.write("skip", step=2, samples=16)
    run.train(2, grad_norm=math.nan, loss=math.inf)
    run.train(3)
    record = read_record(tmp_path / "run", "run", ALL)
    for plot in ("loss", "perplexity", "grad_norm"):
        assert [value is None for value in curve(record, plot).values] == [False, True, False]
    assert record.facts["skipped steps"] == "1"


def test_hours_and_goodput_are_those_of_the_clock(tmp_path: Path) -> None:
    record = read_record(long_run(tmp_path / "run", 1000), "run", ALL)
    hours = [where.hours for where in curve(record, "lr").positions]
    assert hours == sorted(hours)
    # Three waits of an hour, and three hundredths of the steps done twice.
    spent = 1030 * SECONDS + 3 * 3600
    assert hours[-1] == pytest.approx(spent / 3600)
    assert record.facts["goodput"] == f"{1000 * SECONDS / spent:.1%}"
    restarts = [mark for mark in record.marks if mark.kind == "resume"]
    assert [mark.position.step for mark in restarts] == [250, 500, 750]
    assert restarts[0].position.hours == pytest.approx((260 * SECONDS + 3600) / 3600)


def test_steps_that_were_lost_are_no_goodput(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 10)
    run.now -= SECONDS  # the first event is that of the first step
    for step in range(1, 9):
        run.train(step)
    run.start(5, 1)
    run.train(6)
    record = read_record(tmp_path / "run", "run", ALL)
    assert record.facts["goodput"] == f"{6 / 8:.1%}"


def test_without_times_hours_are_those_of_the_steps(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 30, timed=False)
    for step in (10, 20):
        run.train(step)
    run.checkpoint(20)  # 0.1 s of waiting
    run.write("resume", step=15, samples=120, path="step_00000015")
    run.train(20)
    run.train(30)
    record = read_record(tmp_path / "run", "run", ALL)
    assert [where.hours for where in curve(record, "lr").positions] == pytest.approx(
        [10 * SECONDS / 3600, 20 * SECONDS / 3600, 30 * SECONDS / 3600]
    )
    assert record.facts["hours"].endswith("by the seconds of steps: its file has no times")
    assert record.facts["goodput"] == f"{30 * SECONDS / (35 * SECONDS + 0.1):.1%}"


def test_a_file_that_begins_later_counts_no_steps_before(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 1010, timed=False)
    run.write("resume", step=1000, samples=8000, path="step_00001000")
    run.train(1010)
    record = read_record(tmp_path / "run", "run", ALL)
    assert curve(record, "lr").positions[0].hours == pytest.approx(10 * SECONDS / 3600)


def test_memory_is_beside_its_prediction(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 20)
    run.start(0, 0)
    for step in range(1, 21):
        run.train(step)
        if step == 10:
            run.write("forecast", step=10, peak_memory_bytes=4 * GIB, predicted_memory_bytes=5 * GIB)
    record = read_record(tmp_path / "run", "run", ALL)
    predicted = curve(record, "memory", "predicted, fullest rank")
    assert [(where.step, value) for where, value in zip(predicted.positions, predicted.values, strict=True)] == [
        (0, 3.0),
        (10, 5.0),
        (20, 5.0),
    ]
    assert curve(record, "memory", "measured, fullest rank").values == [4.0]
    assert record.facts["memory, predicted"] == "5.00 GiB"
    assert record.facts["layout"] == "dp2"


def test_very_many_marks_of_a_kind_are_drawn_together(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 5000)
    for step in range(1, 5001):
        run.train(step)
        run.write("skip", step=step, samples=8 * step)
    record = read_record(tmp_path / "run", "run", 100)
    assert len(record.marks) <= MOST_MARKS + 1
    assert record.marks[1].text == "10 x skipped step, steps 11 to 20"
    assert record.facts["skipped steps"] == "5000"


def test_every_kind_of_mark_is_kept(tmp_path: Path) -> None:
    record = read_record(long_run(tmp_path / "run", 1000), "run", 100)
    assert {mark.kind for mark in record.marks} == set(MARKS)


def test_marks_tell_why(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 20)
    run.start(0, 0)
    run.train(1)
    run.write("start", step=0, restarts=1)  # killed before there was a checkpoint
    run.train(1)
    run.write("skip", step=1, samples=8, reason="loss")
    run.write("rewind", step=1, passed_over=[8, 24])
    run.start(1, 2)
    record = read_record(tmp_path / "run", "run", ALL)
    assert [mark.text for mark in record.marks] == [
        "restart, step 0",
        "restart, step 1: checkpoints/step_00000001",
        "rewind, step 1: samples from 8 to before 24 passed over",
        "skipped step, step 1: loss",
    ]
    assert record.facts["restarts"] == "2"


def test_the_device_is_told_where_the_run_does(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run")
    assert "device" not in read_record(run, "run", ALL).facts
    for broken in ("[]", "{", '{"device": 1, "peak": 2}', '{"device": "x", "peak": {"flops": "y", "source": 1}}'):
        (run / "environment.json").write_text(broken)
        assert "device" not in read_record(run, "run", ALL).facts
    (run / "environment.json").write_text('{"device": "a\\nb", "peak": {"flops": 312e12, "source": "published"}}')
    facts = read_record(run, "run", ALL).facts
    assert (facts["device"], facts["100 % of MFU"]) == (r"a\nb", "312.00 TFLOP/s, published")


ODD: list[dict[str, Any]] = [
    {"loss": "5"},
    {"loss": True, "lr": [1], "grad_norm": {}, "mfu": None, "seconds": "x", "peak_memory_bytes": 10**400},
    {"total_steps": None, "time": "now", "tokens_per_second": []},
]


@pytest.mark.parametrize("odd", ODD)
def test_what_no_run_writes_is_left_out(odd: dict[str, Any], tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run", 3)
    line = {"event": "train", **train_event(4, 4), **odd}
    with (run / METRICS).open("a") as file:
        file.write(json.dumps(line) + "\n" + '{"event": "eval", "step": 4}\n{"event": "skip"}\n')
    record = read_record(run, "run", ALL)
    assert len(curve(record, "loss", "train").values) == 4


def test_a_run_that_has_not_trained_is_a_sentence(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 3)
    for _ in range(2):
        with pytest.raises(UserError, match=r"metrics\.jsonl has no train event; give a run that has trained a step$"):
            read_record(tmp_path / "run", "run", ALL)
        run.start(0, 0)
    run.train(1, tokens=None)
    with pytest.raises(UserError, match=r"has a train event of step 1 without tokens; take it out, or train again$"):
        read_record(tmp_path / "run", "run", ALL)


def test_a_run_none_of_whose_steps_stand_is_a_sentence(tmp_path: Path) -> None:
    """It was killed before it saved, and has begun again."""
    run = Writer(tmp_path / "run", 3)
    run.start(0, 0)
    run.train(1)
    run.start(0, 1)
    with pytest.raises(UserError, match=r"has no train event since it went back or was started again; give a run"):
        read_record(tmp_path / "run", "run", ALL)
    run.train(1)
    assert len(curve(read_record(tmp_path / "run", "run", ALL), "loss", "train").values) == 1


def test_a_run_that_is_done_and_started_again_keeps_its_goodput_and_its_end(tmp_path: Path) -> None:
    def trained(folder: Path) -> Writer:
        run = Writer(folder, 10)
        run.now -= SECONDS
        for step in range(1, 11):
            run.train(step)
        run.write("stop", step=10, reason="done", status="done")
        return run

    trained(tmp_path / "once").close()
    again = trained(tmp_path / "again")
    again.now += 86_400
    again.start(10, 1)
    again.write("stop", step=10, reason="done at once", status="done")
    again.close()
    once, twice = (read_record(tmp_path / name, "run", ALL) for name in ("once", "again"))
    shown = "goodput", "hours", "restarts", "ended"
    assert [twice.facts.get(name) for name in shown] == [once.facts.get(name) for name in shown]
    assert [mark.kind for mark in twice.marks] == [mark.kind for mark in once.marks]


def test_a_start_from_nothing_undoes_the_one_before(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 20)
    run.start(0, 0)
    for step in range(1, 9):
        run.train(step)
    run.write("start", step=0, restarts=1, predicted_memory_bytes=GIB, layout="tp8")
    run.train(1)
    record = read_record(tmp_path / "run", "run", ALL)
    assert record.facts["step"] == "1 of 20"
    assert record.facts["memory, predicted"] == "1.00 GiB"


def test_a_forecast_of_an_earlier_layout_is_not_that_of_the_last(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 20)
    run.start(0, 0)
    run.train(1)
    run.write("forecast", step=1, predicted_memory_bytes=80 * GIB)
    run.start(1, 1)
    run.train(2)
    assert read_record(tmp_path / "run", "run", ALL).facts["memory, predicted"] == "3.00 GiB"


def test_a_clock_that_is_set_back_stands_still(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 20)
    run.start(0, 0)
    for step in range(1, 5):
        run.train(step)
    run.now -= 3600
    for step in range(5, 9):
        run.train(step)
    hours = [where.hours for where in curve(read_record(tmp_path / "run", "run", ALL), "lr").positions]
    assert hours == sorted(hours)


def test_a_run_without_marks_is_drawn_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run = Writer(tmp_path / "run", 20)
    run.train(1)
    assert draw_picture([read_record(tmp_path / "run", "run", ALL)])
    # What another test left open may be found meanwhile.
    assert [str(warning.message) for warning in recwarn if warning.category is not ResourceWarning] == []
