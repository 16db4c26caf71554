"""The learning rate at its endpoints, and its direction between them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import pytest

from megallama.config.schema import ScheduleConfig
from megallama.schedule import learning_rate

PEAK, FLOOR, STEPS, WARMUP = 3e-4, 3e-5, 100, 10
Kind = Literal["cosine", "linear", "wsd", "constant"]
KINDS: tuple[Kind, ...] = ("cosine", "linear", "wsd", "constant")


def rates(kind: Kind, steps: int = STEPS, warmup: int = WARMUP, decay: int | None = None) -> list[float]:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, min_lr=FLOOR, decay_steps=decay)
    return [learning_rate(step, steps, PEAK, schedule) for step in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_rises_in_equal_steps_from_the_first_update_to_the_peak(kind: Kind) -> None:
    found = rates(kind)
    assert found[:WARMUP] == pytest.approx([PEAK * (step + 1) / WARMUP for step in range(WARMUP)])
    assert found[WARMUP - 1] == PEAK


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 10, 99])
def test_after_warmup_the_rate_never_rises_and_stays_within_its_bounds(kind: Kind, warmup: int) -> None:
    found = rates(kind, warmup=warmup)
    assert max(found) == PEAK
    assert all(after <= before for before, after in pairwise(found[max(0, warmup - 1) :]))
    assert min(found[warmup:]) >= FLOOR


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 98])
def test_the_last_step_has_exactly_min_lr_and_the_one_before_has_more(kind: Kind, warmup: int) -> None:
    found = rates(kind, warmup=warmup)
    assert found[-1] == FLOOR
    assert found[-2] > FLOOR


def test_without_warmup_the_first_step_has_the_peak() -> None:
    for kind in KINDS:
        assert rates(kind, warmup=0)[0] == PEAK
        assert rates(kind, steps=1, warmup=0) == [PEAK]


def test_cosine_is_half_way_down_half_way_through() -> None:
    found = rates("cosine", steps=101, warmup=1)
    assert found[50] == pytest.approx((PEAK + FLOOR) / 2)
    assert found[25] == pytest.approx(FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi / 4)) / 2)


def test_linear_falls_by_the_same_amount_each_step() -> None:
    falls = [before - after for before, after in pairwise(rates("linear")[WARMUP - 1 :])]
    assert falls == pytest.approx([(PEAK - FLOOR) / (STEPS - WARMUP)] * len(falls))


@pytest.mark.parametrize(("decay", "falling"), [(None, 10), (25, 25), (90, 90), (1, 1)])
def test_wsd_holds_the_peak_until_the_last_decay_steps(decay: int | None, falling: int) -> None:
    found = rates("wsd", decay=decay)
    assert found[WARMUP - 1 : STEPS - falling] == [PEAK] * (STEPS - falling - WARMUP + 1)
    falls = [before - after for before, after in pairwise(found[STEPS - falling - 1 :])]
    assert falls == pytest.approx([(PEAK - FLOOR) / falling] * falling)


def test_constant_holds_and_all_hold_past_the_end() -> None:
    assert rates("constant")[WARMUP:] == [PEAK] * (STEPS - WARMUP)
    for kind in KINDS:
        schedule = ScheduleConfig(kind=kind, warmup_steps=WARMUP, min_lr=FLOOR)
        assert learning_rate(STEPS + 5, STEPS, PEAK, schedule) == rates(kind)[-1]
