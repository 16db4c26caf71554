"""Constants from measured steps: what a constant predicts gives that constant back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megallama.errors import UserError
from megallama.plan.calibration.calibrate import MeasuredStep, fitted_efficiency
from megallama.plan.hardware import built_in_hardware
from megallama.plan.time.step_time import step_time_at
from megallama.plan.time.workload import Shape, Workload

H100 = built_in_hardware()["h100-80g"]
WORK = Workload(Shape(32, 4096, 14336, 4096, 1024, 128256), 8192, 1, 8, tp=2, dp=4, layers_by_rank=(8, 8, 8, 8))


def measured(work: Workload, efficiency: float) -> MeasuredStep:
    return MeasuredStep(work, H100, step_time_at(work, H100, efficiency).total)


@pytest.mark.parametrize("efficiency", [0.01, 0.4, 0.99])
def test_a_predicted_step_gives_its_constant_back(efficiency: float) -> None:
    assert fitted_efficiency([measured(WORK, efficiency)]) == pytest.approx(efficiency, abs=1e-8)


def test_steps_that_disagree_are_missed_by_the_same_share_on_average() -> None:
    steps = [measured(WORK, 0.4), measured(replace(WORK, micro_batches=16), 0.6)]
    found = fitted_efficiency(steps)
    slow, fast = (step_time_at(step.work, H100, found).total / step.seconds for step in steps)
    assert slow < 1 < fast
    assert slow * fast == pytest.approx(1)


@pytest.mark.parametrize("seconds", [1e-3, 1e6])
def test_seconds_that_no_constant_gives_are_refused(seconds: float) -> None:
    with pytest.raises(UserError, match=r"^steps of 0?\.?[\de+]+ s fit no efficiency from 0\.001 to 1; check"):
        fitted_efficiency([MeasuredStep(WORK, H100, seconds)])
