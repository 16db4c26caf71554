"""Which lines of metrics.jsonl stand after a run went back: every reader of ours takes these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megallama.errors import UserError
from megallama.run_dir.events import METRICS, read_events, standing, standing_events
from megallama.run_dir.steady import steady_seconds
from megallama.verify.compare import train_losses

Event = dict[str, Any]


def trained(*steps: int, loss: float = 1.0) -> list[Event]:
    return [{"event": "train", "step": step, "loss": loss, "seconds": loss} for step in steps]


def back(event: str, step: int) -> Event:
    return {"event": event, "step": step}


def put(run_dir: Path, *events: Event) -> None:
    (run_dir / METRICS).write_text("".join(f"{json.dumps(event)}\n" for event in events))


@pytest.mark.parametrize("event", ["resume", "rollback", "rewind", "start"])
def test_a_return_undoes_what_came_after_its_step(event: str) -> None:
    first, notice = trained(1, 2, 3, 4), {"event": "notice", "text": "no step"}
    again = trained(3, 4, loss=2.0)
    assert standing([*first, notice, back(event, 2), *again]) == [*first[:2], notice, back(event, 2), *again]


def test_a_return_undoes_returns_to_later_steps() -> None:
    events = [*trained(1, 2, 3, 4), back("resume", 4), *trained(5, 6), back("rollback", 2), back("resume", 2)]
    assert standing(events) == [*trained(1, 2), back("rollback", 2), back("resume", 2)]


def test_an_earlier_return_still_undoes_what_a_later_one_leaves() -> None:
    events = [*trained(1, 2, 3, 4), back("resume", 1), *trained(2, loss=2.0), back("resume", 2), *trained(3, loss=3.0)]
    assert [event["loss"] for event in standing(events) if event["event"] == "train"] == [1.0, 2.0, 3.0]
    assert [event["step"] for event in standing(events) if event["event"] == "train"] == [1, 2, 3]


def test_the_last_line_of_a_kind_a_step_and_a_split_counts() -> None:
    def evaluated(split: str, loss: float) -> Event:
        return {"event": "eval", "step": 4, "split": split, "loss": loss}

    once, twice = [evaluated("train", 1.0), evaluated("validation", 1.0)], evaluated("validation", 2.0)
    assert standing([*once, back("resume", 4), twice]) == [once[0], back("resume", 4), twice]


def test_stragglers_of_one_step_all_stand() -> None:
    late = [{"event": "straggler", "step": 4, "rank": rank} for rank in (2, 3)]
    assert standing([*late, *late]) == late


def test_a_torn_last_line_is_not_read(tmp_path: Path) -> None:
    put(tmp_path, *trained(1, 2))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"event": "train", "st')
    assert standing_events(tmp_path) == trained(1, 2)


@pytest.mark.parametrize(
    "line",
    [
        *("[]", "3", "{}", "", '{"event": "train"}', '{"event": "rollback", "step": "4"}', '{"event": ["a"]}'),
        '{"event": "eval", "step": 1, "split": ["a"]}',
        '{"event": "straggler", "step": 1, "rank": [1]}',
    ],
)
def test_a_line_that_no_run_writes_is_one_sentence(line: str, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(f"{json.dumps(trained(1)[0])}\n{line}\n")
    with pytest.raises(UserError, match=rf"{METRICS}, line 2, .*; take the line out, or train again$"):
        read_events(tmp_path / METRICS)


def test_metrics_that_are_not_there_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        standing_events(tmp_path)


def test_both_readers_take_the_steps_that_stand(tmp_path: Path) -> None:
    """`verify` sees each step once, and `plan --calibrate` none that was undone."""
    events = [*trained(*range(1, 9)), back("rollback", 6), back("resume", 6), *trained(*range(7, 15), loss=2.0)]
    put(tmp_path, *events)
    assert train_losses(tmp_path) == [1.0] * 6 + [2.0] * 8
    assert steady_seconds(events, 1) == [2.0] * 5
    assert steady_seconds([*events, back("rollback", 12)], 1) == [2.0] * 3
    assert steady_seconds([*events, back("rollback", 4)], 1) == []
