"""Skipped steps and rewinds under faults: on one rank alone, and killed in the middle."""

from __future__ import annotations

import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.state import read_saved
from tests.faults.runs import assert_same_run, forked, losses_by_step, steps
from tests.launching import pretrain
from tests.train.test_rewind import BAD, spoiled, words

pytestmark = pytest.mark.faults

DP2 = ["zero.stage=2", "train.average.kind=exponential"]


def test_a_gradient_of_one_rank_of_tp_and_pp_is_skipped_by_all_and_the_run_ends_where_a_clean_one_does(
    byte_dataset: str, tmp_path: Path
) -> None:
    runs = tmp_path / "clean", tmp_path / "run"
    for run, plant in zip(runs, (None, partial(no_number, 3, 12)), strict=True):
        layout = words(byte_dataset, run, "parallel.tensor=2", "parallel.pipeline=2")
        assert pretrain(4, layout, plant=plant) == [(0, "")] * 4
    clean, run = runs
    assert (steps(clean, "skip"), steps(run, "skip")) == ([], [12])
    last = [[float.fromhex(losses_by_step(each)[step]) for step in range(36, 41)] for each in runs]
    assert all(map(math.isfinite, map(float.fromhex, losses_by_step(run).values())))
    assert sum(last[1]) / 5 == pytest.approx(sum(last[0]) / 5, abs=0.1)


def no_number(rank: int, step: int) -> None:
    """A gradient of `rank` is NaN in that step."""
    import megallama.train.loop

    train: Any = megallama.train.loop
    original, seen = train.train_step, list[int]()

    def spoil(run: Any, *rest: Any) -> Any:
        seen.append(run.mesh.rank)
        parameter = next(weight for name, weight in run.model.named_parameters() if "qkv" in name)
        if run.mesh.rank != rank or len(seen) != step:
            return original(run, *rest)
        handle = parameter.register_hook(lambda gradient: gradient * math.nan)
        result = original(run, *rest)
        handle.remove()
        return result

    train.train_step = spoil


@pytest.fixture(scope="module")
def straight(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went back once, undisturbed."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert pretrain(2, words(byte_dataset, run, *DP2), plant=partial(spoiled, BAD)) == [(0, "")] * 2
    assert steps(run, "rewind") == [30]
    return run


@pytest.mark.parametrize(
    ("moment", "rank", "resumed"),
    [
        ("write_skip", 1, 30),
        ("checkpoint_before", 0, 30),
        ("return_to", 0, 30),
        ("continued", 1, 30),
        ("begun_at", 0, 30),
    ],
)
def test_a_kill_in_the_middle_is_followed_by_the_same_decisions_to_the_bit(
    moment: str, rank: int, resumed: int, straight: Path, byte_dataset: str, tmp_path: Path
) -> None:
    """Also where a checkpoint of one of the skipped steps was saved, which is not healthy."""
    run, home = tmp_path / "run", tmp_path / "home"
    start, plant = words(byte_dataset, run, *DP2), partial(killed, rank, moment, tmp_path / "died")
    with forked(2, start, home, plant):
        pass
    assert (tmp_path / "died").exists()
    assert not (run / "checkpoints" / "step_00000040").exists()
    assert pretrain(2, start, plant=plant) == [(0, "")] * 2
    assert steps(run, "resume") == [resumed]
    assert_same_run(run, straight)
    ours, theirs = (read_saved(path / "checkpoints" / "step_00000040").state for path in (run, straight))
    assert ours == theirs


def killed(rank: int, moment: str, died: Path) -> None:
    """The data are spoiled, and `rank` dies once where it calls the function `moment` while it goes back."""
    import megallama.data.loader
    import megallama.train.loop
    import megallama.train.rewind

    spoiled(BAD)
    owner: Any = {
        "write_skip": megallama.train.loop,
        "begun_at": megallama.data.loader.RunData,
    }.get(moment, megallama.train.rewind)
    original = getattr(owner, moment)

    def die(*given: Any, **named: Any) -> Any:
        result = original(*given, **named)
        if os.environ["RANK"] == str(rank) and not died.exists() and (moment != "begun_at" or given[2]):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, moment, die)
