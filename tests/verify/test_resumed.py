"""The resumed column: it passes what goes on as if it had never stopped, and sees what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

import megallama.train.saves
import megallama.verify.verify
from megallama.checkpoint.state import TrainState
from megallama.checkpoint.tensors import EXP_AVG
from megallama.cli import app
from megallama.layout.names import parse_layout
from megallama.model.stages import ModelStages
from megallama.train.engine import Engine
from megallama.verify.compare import worst_difference
from megallama.verify.verify import Plant, verify
from tests.verify.test_parity import debug_config


def _after_load(spoil: Callable[[Engine, TrainState], TrainState]) -> None:
    """Only a run that resumes loads anything, so nothing else is touched."""
    load = megallama.train.saves.load

    def load_and_spoil(path: Path, engine: Engine, model: ModelStages) -> TrainState:
        return spoil(engine, load(path, engine, model))

    megallama.train.saves.load = load_and_spoil


def position_lost() -> None:
    _after_load(lambda engine, state: replace(state, samples=0))


def moments_lost() -> None:
    def forget(engine: Engine, state: TrainState) -> TrainState:
        for fragment in engine.fragments():
            for moment in fragment.moments.values():
                moment.zero_()
        return state

    _after_load(forget)


def moments_not_finite() -> None:
    """The first loss is that of the weights; the step behind it makes them NaN, and so the next loss."""

    def spoil(engine: Engine, state: TrainState) -> TrainState:
        for fragment in engine.fragments():
            fragment.moments[EXP_AVG].fill_(float("nan"))
        return state

    _after_load(spoil)


@pytest.mark.parametrize("plant", [position_lost, moments_lost, moments_not_finite])
def test_a_layout_that_resumes_elsewhere_than_it_stopped_is_reported(plant: Plant) -> None:
    report = verify(debug_config(), [parse_layout("dp2")], steps=4, resume=True, plant=plant)
    assert report.verdicts[0].failures == ["resumed"]


def test_the_command_resumes_each_layout_and_exits_with_1_if_one_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["verify", "configs/debug.yaml", "--layouts", "zero2", "--steps", "2"]
    right = CliRunner().invoke(app, [*arguments, "--json"])
    assert right.exit_code == 0
    assert json.loads(right.stdout)["layouts"][0]["resumed"] <= 1e-6
    monkeypatch.setattr(megallama.verify.verify, "verify", partial(verify, plant=position_lost))
    wrong = CliRunner().invoke(app, arguments)
    assert wrong.exit_code == 1
    assert "DIFFERS" in wrong.stdout
    assert "zero2: resumed" in wrong.stdout


def test_a_pair_of_which_one_is_nan_differs_most_wherever_it_stands() -> None:
    nan = float("nan")
    for found in ([nan, 2.0, 2.0], [2.0, nan, 2.0], [2.0, 2.0, nan]):
        assert not worst_difference(found, [2.0, 2.0, 2.0]) <= 1e9
    assert worst_difference([2.0, 3.0], [2.0, 2.0]) == 0.5
