"""Every prefix of a blend is within one sample of its weights, and any position is found at once, stages included."""

from __future__ import annotations

import random
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megallama.data.blend import MOST_PERIOD, Blend, Pattern, period_counts, stage_of
from megallama.errors import UserError

SAMPLES = 10**6
WEIGHTS = {
    "web": [0.6, 0.15, 0.1, 0.1, 0.05],
    "thirds": [0.333, 0.334, 0.333, 1e-3, 2.5],
    "large": [7, 11, 13, 17, 19],
    "rounded": [3.14159265358979, 2.71828182845904, 1.4142135623731, 0.57721566490153, 1.61803398874989],
    "one": [1.0],
}


def order_of(pattern: Pattern, samples: int) -> np.ndarray:
    found = [pattern.locate(number) for number in range(min(samples, pattern.period))]
    return np.resize([source for source, _ in found], samples)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_every_prefix_is_within_one_sample_of_the_weights(weights: list[float]) -> None:
    pattern = Pattern(period_counts(weights))
    order, numbers = order_of(pattern, SAMPLES), np.arange(1, SAMPLES + 1)
    for source, weight in enumerate(weights):
        read = np.cumsum(order == source)
        share = pattern.counts[source] / pattern.period
        assert np.abs(read - share * numbers).max() < 1
        # Weights with a longer period are rounded to one that differs by less than a sample in each.
        assert abs(share - weight / sum(weights)) < 1 / MOST_PERIOD
        if pattern.period < MOST_PERIOD:
            assert np.abs(read - weight / sum(weights) * numbers).max() < 1


@pytest.mark.parametrize("seed", range(20))
def test_random_weights_keep_to_their_shares(seed: int) -> None:
    draw = random.Random(seed)
    counts = [draw.randint(1, 40) for _ in range(draw.randint(1, 12))]
    pattern = Pattern(counts)
    order = order_of(pattern, pattern.period)
    for source, count in enumerate(counts):
        lag = np.cumsum(order == source) - np.arange(1, pattern.period + 1) * count / pattern.period
        assert -1 < lag.min() <= lag.max() < 1


def test_shares_are_the_decimals_that_were_written() -> None:
    assert period_counts([0.6, 0.15, 0.1, 0.1, 0.05]) == (12, 3, 2, 2, 1)
    assert period_counts([6, 4]) == period_counts([0.6, 0.4]) == (3, 2)
    assert period_counts([1e-3, 0.999]) == (1, 999)
    counts = period_counts([1 / 3, 1 / 7, 0.123456789])
    assert sum(counts) == MOST_PERIOD


def test_a_weight_too_small_for_a_period_is_refused() -> None:
    with pytest.raises(UserError, match=r"weight=1e-06 of tiny is less than 1 in 262,144 .* use 4\.53e-06 or more"):
        stage_of(0, {"web": 1.1866, "tiny": 1e-6})


def test_a_position_is_what_counting_from_the_first_sample_gives() -> None:
    blend = Blend([stage_of(0, {"b": 2, "a": 1}), stage_of(50, {"c": 1}), stage_of(53, {"a": 0.3, "c": 0.7})])
    assert blend.names == ("a", "b", "c")
    seen: Counter[int] = Counter()
    for number in range(400):
        assert blend.read(number) == [seen[source] for source in range(3)]
        source, count = blend.locate(number)
        assert count == seen[source]
        assert blend.number(source, count) == number
        seen[source] += 1
    assert seen[1] == 33  # of 50 samples, two thirds within one
    assert blend.number(1, 33) is None
    assert Fraction(3, 10) == blend.stages[2].shares["a"]


def test_a_position_far_out_is_consistent() -> None:
    blend = Blend([stage_of(0, {"a": 0.6, "b": 0.4}), stage_of(10**12, {"a": 0.5, "c": 0.5})])
    far = 10**15 + 7
    source, count = blend.locate(far)
    assert blend.read(far)[source] == count
    assert blend.read(10**12) == [6 * 10**11, 4 * 10**11, 0]


def test_the_order_in_which_sources_are_written_means_nothing() -> None:
    weights = {"web": 0.5, "code": 0.3, "books": 0.2}
    one, other = Blend([stage_of(0, weights)]), Blend([stage_of(0, dict(reversed(weights.items())))])
    assert [one.locate(number) for number in range(100)] == [other.locate(number) for number in range(100)]


def test_the_order_is_the_recorded_one() -> None:
    # A change of it breaks the resumption of every run of a mixture in the world.
    pattern = Pattern((12, 3, 2, 2, 1))
    assert "".join(str(pattern.locate(number)[0]) for number in range(20)) == "00102003010020100304"


def test_the_longest_period_takes_less_than_a_second_of_processor_time() -> None:
    draw = random.Random(0)
    begin = time.process_time()
    pattern = Pattern(period_counts([0.1 + draw.random() for _ in range(1000)]))
    assert time.process_time() - begin < 1.0
    assert pattern.period == MOST_PERIOD
