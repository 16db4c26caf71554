"""Predicted step times against published runs: the table of docs/planning.md, and its bounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.published import (
    FEWEST_RUNS,
    Score,
    fit,
    fitted,
    fitted_constants,
    held_out,
    published_runs,
    scores,
    summary,
    table,
    with_one_llama,
)
from megallama.plan.hardware import built_in_hardware
from megallama.plan.time.step_time import step_time_at

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"


@pytest.fixture(scope="module")
def found() -> list[Score]:
    return scores(published_runs())


def test_four_of_five_runs_are_within_10_percent_and_all_within_20(found: list[Score]) -> None:
    errors = [abs(score.error) for score in fitted(found)]
    assert len(errors) == 26
    assert sum(error <= 0.1 for error in errors) >= 0.8 * len(errors)
    assert max(errors) <= 0.2


def test_the_other_convention_of_mfu_keeps_the_bounds() -> None:
    errors = [abs(score.error) for score in fitted(scores(published_runs("causal")))]
    assert sum(error <= 0.1 for error in errors) >= 0.8 * len(errors)
    assert max(errors) <= 0.2


def test_one_constant_for_both_llamas_keeps_the_bounds() -> None:
    errors = [abs(score.error) for score in fitted(scores(with_one_llama(published_runs())))]
    assert sum(error <= 0.1 for error in errors) >= 0.8 * len(errors)
    assert max(errors) <= 0.2


def test_overlapped_tensor_parallelism_would_predict_the_largest_runs_a_tenth_too_fast() -> None:
    for score in held_out(scores(published_runs())):
        work = replace(score.run.work, overlapped=score.run.work.overlapped | {"tensor"})
        assert -0.12 <= step_time_at(work, score.run.gpu, score.efficiency).total / score.run.measured - 1 <= -0.08


def test_constants_of_hardware_yaml_are_the_fit() -> None:
    fitted = fitted_constants(published_runs())
    hardware = built_in_hardware()
    declared = {
        (gpu.key, software): constant
        for gpu in hardware.values()
        if gpu.efficiency_of is None
        for software, constant in gpu.efficiency.items()
    }
    assert declared == {key: pytest.approx(constant, abs=5e-4) for key, constant in fitted.items()}


def test_every_constant_has_three_runs_or_more() -> None:
    counts = Counter(run.generation for run in published_runs() if not run.held_out)
    assert min(counts.values()) >= FEWEST_RUNS == 3


def test_runs_that_no_constant_was_fitted_to_are_within_10_percent(found: list[Score]) -> None:
    constants = fitted_constants(published_runs())
    assert [score.run.work.world_size for score in held_out(found)] == [8192, 16384]
    for score in held_out(found):
        assert score.efficiency == pytest.approx(constants[score.run.generation])
        assert abs(score.error) <= 0.1


def test_no_run_is_scored_with_a_constant_that_it_was_fitted_to(found: list[Score]) -> None:
    for score in fitted(found):
        group = [other.run for other in fitted(found) if other.run.generation == score.run.generation]
        others = [run for run in group if run is not score.run]
        assert score.efficiency == pytest.approx(fit(others))
        if abs(score.error) > 0.01:
            assert abs(fit(group) - score.efficiency) > 1e-4


def test_the_page_has_the_table_the_summaries_and_every_assumption(found: list[Score]) -> None:
    page = PAGE.read_text()
    assert table(fitted(found)) in page, "python benchmarks/published.py prints it"
    assert table(held_out(found)) in page
    text = " ".join(page.split())
    assert summary(fitted(found)) in text
    assert summary(fitted(scores(published_runs("causal")))) in text
    assert summary(fitted(scores(with_one_llama(published_runs())))) in text
    for run in published_runs():
        assert run.cite in text, run.cite
        assert " ".join(run.assumed.split()) in text, run.assumed
