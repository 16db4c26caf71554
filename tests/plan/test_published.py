"""Predicted step times against published runs: what benchmarks/published.py prints, and its bounds."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.published import PublishedRun, fitted_constants, published_runs, summary
from megallama.cli import app
from megallama.hardware.gpus import built_in_hardware
from megallama.plan.time.software import known_software

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "planning.md"


@pytest.fixture(scope="module")
def runs() -> list[PublishedRun]:
    return published_runs()


@pytest.mark.parametrize("fitted", [True, False])
def test_four_of_five_runs_are_within_10_percent_and_all_within_30(runs: list[PublishedRun], fitted: bool) -> None:
    errors = [abs(run.error) for run in runs if run.fitted == fitted]
    assert len(errors) == (50 if fitted else 187)
    assert sum(error <= 0.1 for error in errors) >= 0.8 * len(errors)
    assert max(errors) <= 0.3


def test_the_other_convention_of_mfu_keeps_the_bounds() -> None:
    errors = [abs(run.error) for run in published_runs("causal")]
    assert sum(error <= 0.1 for error in errors) >= 0.8 * len(errors)
    assert max(errors) <= 0.3


def test_constants_of_hardware_yaml_are_the_fit(runs: list[PublishedRun]) -> None:
    hardware = built_in_hardware()
    for (gpu, generation), constant in fitted_constants(runs).items():
        assert hardware[gpu].efficiency[generation] == pytest.approx(constant, abs=5e-4)
    generations = {software.generation or name for name, software in known_software().items()}
    assert {name for gpu in hardware.values() for name in gpu.efficiency} <= generations


@pytest.mark.parametrize("number", [0, 17, 24, 120, 230])
def test_the_command_of_a_run_prints_what_is_scored(runs: list[PublishedRun], number: int) -> None:
    run = runs[number]
    _, _, _, *words = shlex.split(run.command)
    result = CliRunner().invoke(
        app, ["plan", str(ROOT / "configs" / "7b.yaml"), *words, "--explain"], env={"COLUMNS": "300"}
    )
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("per GPU")]
    assert float(line.split()[-1].replace(",", "")) == pytest.approx(run.predicted, rel=1e-3), result.stdout


def test_the_readme_tells_the_score(runs: list[PublishedRun]) -> None:
    within = sum(abs(run.error) <= 0.1 for run in runs)
    assert f"{len(runs)} published runs, {within} of them within 10 %" in (ROOT / "README.md").read_text()


def test_the_page_has_the_summaries_and_every_source(runs: list[PublishedRun]) -> None:
    text = " ".join(PAGE.read_text().split())
    for part in (runs, [run for run in runs if run.fitted], [run for run in runs if not run.fitted]):
        assert summary(part) in text
    for software in {run.software for run in runs}:
        assert summary([run for run in runs if run.software == software]) in text, software
