"""How long a run is, by the three ways to say it, and what a changed batch leaves of it."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from megallama.checkpoint.format import STATE, TornCheckpointError
from megallama.checkpoint.state import TrainState, newest_seen, read_saved, seen_before
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import built_in_hardware
from megallama.layout.budget import (
    NOTHING_SEEN,
    Seen,
    place,
    schedule_batch,
    schedule_steps,
    total_steps,
    total_tokens,
    united,
)
from megallama.layout.check import check_config
from megallama.plan.search.changes import nearest_change
from megallama.plan.time.software import machine
from megallama.plan.time.step_time import step_time
from megallama.train.lr_schedule import next_rate
from tests.checkpoint.damaging import CHECKPOINT, edit
from tests.plan.test_plan_command import CONFIGS, app


def run(*overrides: str, name: str = "1b.yaml") -> RunConfig:
    return load_config(CONFIGS / name, overrides)


def test_a_batch_that_is_doubled_keeps_the_sequences_and_takes_half_of_the_steps_left() -> None:
    """3,064 sequences: 120 steps of 8, then 132 of 16, the last of which passes them by 8."""
    config = run(f"train.tokens={3064 * 2048}", "train.steps=null", "train.global_batch_size=16")
    assert total_steps(config, Seen(120, 960, 8)) == 252
    assert total_steps(config, Seen(251, 960 + 131 * 16, 8)) == 252
    assert total_steps(config, Seen(252, 3072, 8)) == 252
    assert total_steps(config, Seen(300, 4800, 8)) == 300, "more than it takes: all are done"


@pytest.mark.parametrize("asked", ["train.steps=chinchilla", "train.tokens=21B train.steps=null"])
def test_without_a_change_the_steps_are_the_fewest_that_reach_the_tokens(asked: str) -> None:
    config = run(*asked.split(), "train.global_batch_size=24")
    tokens, steps = total_tokens(config), total_steps(config)
    assert tokens is not None
    assert (steps - 1) * config.tokens_per_step < tokens <= steps * config.tokens_per_step
    assert all(total_steps(config, Seen(step, 24 * step, 24)) == steps for step in (1, 7, steps - 1, steps))


def test_steps_stay_steps_whatever_was_seen() -> None:
    config = run("train.steps=500", "schedule.warmup_steps=0", "train.global_batch_size=16")
    assert total_tokens(config) is None
    assert [total_steps(config, seen) for seen in (NOTHING_SEEN, Seen(120, 10**6, 8), Seen(600, 1, 1))] == [500] * 3


def test_a_step_of_the_schedule_is_that_of_the_batch_that_the_run_began_with() -> None:
    config = run("train.global_batch_size=16")
    assert schedule_batch(config, NOTHING_SEEN) == 16
    assert schedule_batch(config, Seen(120, 960, 8)) == 8
    assert schedule_batch(config, Seen(120, 960)) == 8, "a checkpoint from before it was recorded"


def test_the_unit_of_a_schedule_is_as_many_tokens_whatever_the_sequences_are() -> None:
    """8 sequences of 64 are half of one of 1,024: warm-up and rate stay where they are in the data."""
    state = TrainState(10, 80, 10, None, 8)
    longer = state.in_sequences_of(1024, 64)
    assert (longer.samples, longer.first_batch) == (5, 0.5)
    assert longer.in_sequences_of(64, 1024).first_batch == 8
    words = ["train.tokens=1024000", "train.steps=null", "schedule.warmup_steps=20"]
    short = run(*words, "data.sequence_length=64", "train.global_batch_size=16")
    long = run(*words, "data.sequence_length=1024", "train.global_batch_size=1")
    assert schedule_steps(short, state.seen) == schedule_steps(long, longer.seen) == 2000
    assert next_rate(short, state.seen) == pytest.approx(next_rate(long, longer.seen))


def test_a_checkpoint_of_the_first_format_says_how_far_its_run_is(tmp_path: Path) -> None:
    assert newest_seen(run(f"run.dir={tmp_path}")) == newest_seen(run(f"run.dir={tmp_path}/none")) == NOTHING_SEEN
    (tmp_path / "checkpoints").symlink_to(CHECKPOINT.parent)
    assert newest_seen(run(f"run.dir={tmp_path}")) == Seen(3, 12)
    assert seen_before(run(f"run.dir={tmp_path}")) == Seen(3, 12)
    assert seen_before(run(f"run.dir={tmp_path}", "checkpoint.resume=never")) == NOTHING_SEEN


ILLEGAL: list[object] = [
    *(None, [], {}, {"step": 5}, {"step": "5", "samples": 9}, {"step": 5, "samples": math.inf}),
    *({"step": 5, "samples": 50, "first_batch": batch} for batch in (-1, 0, "4", True, [4])),
]


@pytest.mark.parametrize("state", ILLEGAL)
def test_a_checkpoint_that_says_no_legal_numbers_is_passed_over(tmp_path: Path, state: object) -> None:
    older, newer = (tmp_path / "checkpoints" / name for name in (CHECKPOINT.name, "step_00000005"))
    for path in (older, newer):
        shutil.copytree(CHECKPOINT, path)
    edit(newer / STATE, lambda tree: tree.update(state=state))
    assert newest_seen(run(f"run.dir={tmp_path}")) == Seen(3, 12)
    if isinstance(state, dict) and "first_batch" in state:
        with pytest.raises(TornCheckpointError, match="first_batch"):
            read_saved(newer)


def test_the_step_of_a_run_that_goes_on_by_a_larger_batch_is_planned_all_the_same() -> None:
    """Measured beside predicted, and what would need less memory: a new run by that batch would be refused."""
    config = run("train.steps=null", "train.tokens=20M", "schedule.warmup_steps=100", "train.global_batch_size=128")
    with pytest.raises(UserError, match=r"warmup_steps=100 leaves nothing of train\.tokens=20000000 = 77 steps"):
        check_config(config, 1)
    check_config(config, 1, Seen(120, 120 * 64, 64))
    assert step_time(config, 1, machine(built_in_hardware()["h100-80g"])).total > 0
    assert nearest_change(config, 1) is not None


def test_a_plan_of_train_tokens_is_that_of_the_option() -> None:
    def planned(*words: str) -> dict[str, dict[str, Any]]:
        result = CliRunner().invoke(app, [str(CONFIGS / "7b.yaml"), "--gpus", "128", "--gpu", "a100", *words, "--json"])
        assert result.exit_code == 0, result.exception
        found: dict[str, dict[str, Any]] = json.loads(result.stdout)
        return found

    in_config = planned("train.steps=null", "train.tokens=15T")
    assert in_config == planned("--tokens", "15T")
    config = run("train.steps=null", "train.tokens=15T", name="7b.yaml")
    assert in_config["batch"]["steps"] == in_config["cost"]["steps"] == total_steps(config)
    assert planned("train.steps=null", "train.tokens=15T", "--tokens", "2T") == planned("--tokens", "2T")


def test_places_are_all_numbers_but_those_that_are_passed_over() -> None:
    random = Random(0)
    for _ in range(200):
        ranges = united(
            (first, first + random.randint(1, 9)) for first in random.sample(range(60), random.randint(0, 6))
        )
        out = {number for first, end in ranges for number in range(first, end)}
        kept = [number for number in range(200) if number not in out]
        assert [place(sample, ranges) for sample in range(len(kept))] == kept
        assert all(before[1] < after[0] for before, after in pairwise(ranges))
