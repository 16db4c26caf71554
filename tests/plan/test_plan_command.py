"""`megallama plan`: the table and the dictionary, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from megallama.errors import UserError
from megallama.plan.cli import plan

CONFIGS = Path(__file__).parents[2] / "configs"
app = typer.Typer()
app.command()(plan)


def planned(*arguments: str) -> dict[str, dict[str, Any]]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.exception
    found: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return found


def test_7b_on_128_gpus() -> None:
    found = planned(str(CONFIGS / "7b.yaml"), "--gpus", "128")
    assert found["parameters"]["total"] == 6_738_415_616
    assert found["parameters"]["matmul"] == 6_607_077_376
    assert found["batch"]["dp_size"] == 16
    assert found["batch"]["gradient_accumulation_steps"] == 16
    assert found["batch"]["tokens"] == 300_000 * 1024 * 2048
    assert found["flops"]["per_token_full"] == 6 * 6_607_077_376 + 12 * 32 * 4096 * 2048
    assert len(found["state_by_pipeline_rank"]) == 4
    assert found["state"]["total"] == max(found["state_by_pipeline_rank"].values())


def test_the_table_shows_the_arithmetic() -> None:
    result = CliRunner().invoke(app, [str(CONFIGS / "7b.yaml"), "--gpus", "128"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    for words in ("6,738,415,616", "3 * 4096 * 11008", "1024 / (4 * 16)", "GiB", "penalty"):
        assert words in result.stdout


def test_overrides_recomputation_and_tokens_change_the_plan() -> None:
    path = str(CONFIGS / "8b.yaml")
    plain, other = planned(path), planned(path, "train.recompute=full", "--tokens", "15T", "--gpus", "16")
    assert "per_token_hardware" not in plain["flops"]
    assert other["flops"]["per_token_hardware"] > other["flops"]["per_token_full"]
    assert other["loss"]["loss"] == pytest.approx(2.0215, abs=5e-5)
    assert other["loss"]["penalty"] == pytest.approx(2.0215 - 1.9679, abs=1e-4)
    assert plain["loss"]["penalty"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("quantity", ["1", "1e30"])
def test_every_legal_quantity_has_a_finite_plan(quantity: str) -> None:
    given = ["--params", quantity, "--tokens", quantity]
    for arguments in (given, given[:2], given[2:], ["--flops", quantity], [str(CONFIGS / "7b.yaml"), *given[2:]]):
        found = planned(*arguments)
        assert all(math.isfinite(figure) for part in found.values() for figure in part.values())


def test_budgets_without_a_run() -> None:
    optimum = planned("--flops", "1e21")["optimum_for_flops"]
    assert optimum["parameters Besiroglu et al."] == pytest.approx(2.778e9, rel=2e-4)
    assert planned("--params", "7B")["optimum_for_size"]["Besiroglu et al."] == pytest.approx(20.63 * 7e9, rel=3e-4)
    size = planned("--tokens", "144.4B")["optimum_for_tokens"]["Besiroglu et al."]
    assert size == pytest.approx(7e9, rel=1e-3)
    both = planned("--params", "7e9", "--tokens", "1T")
    assert set(both) == {"loss", "optimum_for_size"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to plan; give a CONFIG such as configs/7b.yaml, or --flops, --params or --tokens"),
        (["--params", "seven"], "--params=seven is not a number from 1 to 1e+30; write it as 7e9 or 7B"),
        (["--flops", "-1"], "--flops=-1 is not a number from 1"),
        (["--tokens", "inf"], "--tokens=inf is not a number from 1"),
        (["--params", "nan"], "--params=nan is not a number from 1"),
        (["--params", "1e308"], "--params=1e308 is not a number from 1"),
        (["--tokens", "1e308"], "--tokens=1e308 is not a number from 1"),
        (["--params", "7B", "--tokens", "1e308", "--json"], "--tokens=1e308 is not a number from 1"),
        (["--params", "1e-300", "--tokens", "1e-300"], "--params=1e-300 is not a number from 1"),
        ([str(CONFIGS / "7b.yaml"), "--params", "7B"], "--params=7B contradicts "),
        ([str(CONFIGS / "7b.yaml"), "--gpus", "9"], "nearest legal: world size 8 or 16"),
    ],
)
def test_mistakes_reach_the_caller_as_one_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert sentence in str(result.exception)
