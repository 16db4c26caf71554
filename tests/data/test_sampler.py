"""The order of samples is a permutation per epoch and a pure function of (seed, position)."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from megallama.data.sampler import Sampler, micro_batch_indices, num_windows, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 4097])
def test_every_epoch_visits_every_window_once(size: int) -> None:
    sampler = Sampler(size, seed=7)
    for epoch in range(3):
        assert sorted(sampler.window(epoch * size + i) for i in range(size)) == list(range(size))


@pytest.mark.layouts
def test_every_size_up_to_10000_is_permuted() -> None:
    """Of a domain of 4^h the images are walked in arrays, which is what `permuted` does one by one."""
    for half in range(1, 8):
        largest = 4**half
        images = np.array([permuted(index, largest, "7/3") for index in range(largest)])
        for size in range(largest // 4 + 1 if half > 1 else 1, min(largest, 10_000) + 1):
            found = images[:size]
            while (outside := found >= size).any():
                found = np.where(outside, images[found], found)
            assert (np.bincount(found, minlength=size) == 1).all(), size
            assert found[size // 2] == permuted(size // 2, size, "7/3"), size


def test_a_million_windows_come_uniformly() -> None:
    size, drawn, bins = 10**6, 20_000, 100
    found = np.array([permuted(index, size, "1234/0") for index in range(drawn)])
    assert len(np.unique(found)) == drawn
    pairs = found[::2] * bins // size, found[1::2] * bins // size
    for cells, count in ((found * bins // size, bins), (pairs[0] // 5 * 20 + pairs[1] // 5, 400)):
        expected = len(cells) / count
        chi_square = float(((np.bincount(cells, minlength=count) - expected) ** 2 / expected).sum())
        assert abs(chi_square - (count - 1)) < 5 * (2 * (count - 1)) ** 0.5


def test_a_sample_of_a_trillion_is_found_at_once() -> None:
    sampler, numbers = Sampler(10**12, 7), range(5 * 10**11, 5 * 10**11 + 1000)
    begin = time.process_time()
    found = {sampler.window(number) for number in numbers}
    assert time.process_time() - begin < 0.2  # of a thousand: a few microseconds each, on a slow machine as well
    assert len(found) == 1000
    assert max(found) < 10**12


def test_epochs_and_seeds_differ() -> None:
    orders = [
        [Sampler(1000, seed).window(epoch * 1000 + i) for i in range(1000)] for seed in (0, 1) for epoch in (0, 1)
    ]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # 1 expected


@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_each_window_comes_equally_often_at_each_place(size: int) -> None:
    trials = 10_000
    counts = Counter((i, permuted(i, size, f"{trial}")) for trial in range(trials) for i in range(size))
    expected = trials / size
    chi_square = sum((counts[i, j] - expected) ** 2 / expected for i in range(size) for j in range(size))
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_neighbours_are_scattered() -> None:
    size = 100_000
    order = [permuted(i, size, "0/0") for i in range(2000)]
    steps = [abs(a - b) for a, b in itertools.pairwise(order)]
    assert abs(sum(steps) / len(steps) / size - 1 / 3) < 0.02  # mean distance of two uniform points
    assert abs(sum(order) / len(order) / size - 1 / 2) < 0.03


def test_order_is_the_recorded_one() -> None:
    # A change of these numbers breaks the resumption of every run in the world.
    assert [Sampler(1000, 1234).window(i) for i in (0, 1, 2, 999, 1000, 123_456)] == [660, 867, 809, 234, 840, 817]


@pytest.mark.parametrize(("tokens", "length", "windows"), [(0, 4, 0), (4, 4, 0), (5, 4, 1), (8, 4, 1), (9, 4, 2)])
def test_tail_shorter_than_a_window_is_dropped(tokens: int, length: int, windows: int) -> None:
    assert num_windows(tokens, length) == windows


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 3), (3, 4)])
def test_ranks_and_micro_batches_cover_a_step_exactly_once(micro_batch_size: int, dp_size: int) -> None:
    global_batch_size = 12 * micro_batch_size * dp_size
    first = 5 * global_batch_size
    samples = [
        sample
        for micro in range(12)
        for rank in range(dp_size)
        for sample in micro_batch_indices(first, micro, micro_batch_size, rank, dp_size)
    ]
    assert samples == list(range(first, first + global_batch_size))


def test_sampler_imports_no_torch() -> None:
    code = "import sys, megallama.data.sampler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
