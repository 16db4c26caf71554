"""Costs are fitted with what they grow with, and published runs are put in the order of their GPUs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published import growing, growth_table, published_runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import growth

    return growth


@pytest.mark.parametrize("fit", [(3.0, 0.0, 0.0), (3.0, 0.5, 0.0), (3.0, 0.0, 0.25), (1.0, 0.5, 2.0)])
def test_a_cost_is_fitted_by_what_it_grows_with(growth: Any, fit: tuple[float, float, float]) -> None:
    ranks = [1, 2, 4, 8, 16]
    costs = [fit[0] + fit[1] * n + fit[2] * math.log2(n) for n in ranks]
    found = growth.fitted(ranks, costs)
    assert found == pytest.approx(fit, abs=1e-9)
    assert growth.predicted(found, 1024) == pytest.approx(fit[0] + 1024 * fit[1] + 10 * fit[2])


def test_a_cost_that_falls_is_not_carried_on_below_nothing(growth: Any) -> None:
    found = growth.fitted([1, 2, 4, 8], [8.0, 7.0, 6.0, 5.0])
    assert found == pytest.approx((6.5, 0.0, 0.0))


def test_published_runs_stand_by_their_gpus() -> None:
    families = growing(published_runs())
    gpus = [[run.gpus for run in family] for family in families]
    assert [8192, 16384] in gpus and [48, 96, 768, 3072] in gpus
    assert all(numbers == sorted(numbers) and len(set(numbers)) > 1 for numbers in gpus)
    (largest,) = (family for family in families if family[-1].gpus == 16384)
    published, predicted = largest[-1].seconds
    assert predicted / published == pytest.approx(1 + largest[-1].error)
    assert f"| 16,384 | {published:.3g} | {predicted:.3g} |" in growth_table([largest])


@pytest.mark.benchmarks
def test_the_command_measures_and_fits() -> None:
    command = [sys.executable, "benchmarks/growth.py", "--ranks", "1", "2", "--steps", "2", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["measured"].keys() == {"1", "2"}
    for found in report["measured"].values():
        assert found.keys() == report["fitted"].keys()
        assert all(value > 0 for value in found.values())
    assert report["alone"].keys() == {"1", "64", "1024", "16384"}
