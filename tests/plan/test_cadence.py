"""How often to save: the published table, and the formulas against a simulation of failures."""

from __future__ import annotations

from random import Random

import pytest

from megallama.plan.report.cadence import (
    GPU_HOURS_BETWEEN_FAILURES,
    cadence,
    daly_interval,
    lost_share,
    young_interval,
)


@pytest.mark.parametrize(
    ("gpus", "hours", "stop", "minutes", "lost"),
    [
        (64, 792, 30, 218, 0.005),
        (64, 792, 120, 436, 0.009),
        (1024, 49.5, 30, 55, 0.018),
        (1024, 49.5, 120, 109, 0.037),
        (16384, 3.1, 30, 14, 0.073),
        (16384, 3.1, 120, 27, 0.147),
    ],
)
def test_intervals_and_losses_of_a_published_failure_rate(
    gpus: int, hours: float, stop: float, minutes: float, lost: float
) -> None:
    failure = GPU_HOURS_BETWEEN_FAILURES * 3600 / gpus
    assert failure / 3600 == pytest.approx(hours, rel=0.01)
    interval = young_interval(stop, failure)
    assert interval / 60 == pytest.approx(minutes, abs=0.6)
    assert lost_share(interval, stop, failure, restart=0) == pytest.approx(lost, abs=6e-4)


@pytest.mark.parametrize("stop", [10.0, 300.0, 2000.0])
def test_no_other_interval_loses_less_where_failures_strike_at_random(stop: float) -> None:
    failure = 10_000.0
    best = daly_interval(stop, failure)
    losses = {factor: simulated_loss(factor * best, stop, failure) for factor in (0.4, 1.0, 2.5)}
    assert min(losses, key=lambda factor: losses[factor]) == 1.0, losses


def simulated_loss(interval: float, stop: float, failure: float) -> float:
    """The share of time in which no lasting work was done, over many failures."""
    random, done, spent = Random(7), 0.0, 0.0
    while spent < 20_000 * failure:
        until = random.expovariate(1 / failure)
        done += until // (interval + stop) * interval
        spent += until
    return 1 - done / spent


def test_a_save_that_takes_longer_than_failures_let_it_comes_once_a_failure() -> None:
    assert daly_interval(30.0, 10.0) == 10.0


def test_a_run_of_seventy_billion_on_two_thousand_gpus() -> None:
    found = cadence(70_553_706_496, 2048)
    assert found.size == 12 * 70_553_706_496
    assert found.failure_seconds / 3600 == pytest.approx(50_700 / 2048)
    assert 60 < found.interval_seconds < 1200
    assert 0 < found.lost < 0.02
