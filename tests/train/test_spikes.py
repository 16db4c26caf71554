"""What counts as a spike, against the same rule in NumPy; and that nothing waits for the device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megallama.train.spikes import LEAST_DEVIATION, Spikes

CPU = torch.device("cpu")


def judged(spikes: Spikes, loss: float, norm: float) -> tuple[bool, bool]:
    said = spikes.judge(torch.tensor(loss), torch.tensor(norm)).tolist()
    return said[0], said[1]


def test_a_step_stands_out_by_the_mean_and_deviation_of_the_last_updates_alone() -> None:
    random = np.random.default_rng(0)
    spikes, kept = Spikes(4.0, 16, CPU), np.empty((0, 2))
    seen = 0
    for step in range(400):
        values = random.normal([2.0, 1.0], [0.1, 0.3]) * (1 + 3 * (random.random(2) < 0.03))
        values = values.astype(np.float32).astype(np.float64)
        window = kept[-16:]
        bounds = np.full(2, np.inf)
        if len(window) >= 8:
            bounds = window.mean(0) + 4 * np.maximum(window.std(0), LEAST_DEVIATION * abs(window.mean(0)))
        expected = values > bounds
        assert judged(spikes, *values) == tuple(expected), step
        seen += expected.any()
        if not expected.any():
            kept = np.vstack([kept, values])
    assert 5 < seen < 60
    assert np.allclose(spikes.remembered, kept[-16:].T, atol=0.0)


def test_a_level_that_has_risen_is_skipped_every_time() -> None:
    spikes = Spikes(6.0, 8, CPU)
    assert [judged(spikes, 1.0, 1.0) for _ in range(8)] == [(False, False)] * 8
    assert [judged(spikes, 1.05, 1.0) for _ in range(3)] == [(False, False)] * 3
    assert [judged(spikes, 3.0, 1.0) for _ in range(50)] == [(True, False)] * 50
    assert judged(spikes, 1.0, 9.0) == (False, True)
    assert judged(spikes, 0.1, 0.0) == (False, False)


def test_what_is_no_number_stands_out_at_once_and_is_not_remembered() -> None:
    spikes = Spikes(6.0, 8, CPU)
    assert judged(spikes, math.nan, 1.0) == (True, False)
    assert judged(spikes, 1.0, math.inf) == (False, True)
    assert spikes.remembered == ((), ())


def test_what_is_remembered_goes_on_where_it_was() -> None:
    one, other = Spikes(5.0, 8, CPU), Spikes(5.0, 8, CPU)
    values = [(2.0 + 0.1 * math.sin(step), 1.0 + 0.1 * math.cos(step)) for step in range(13)]
    for loss, norm in values:
        judged(one, loss, norm)
    other.remember(*one.remembered)
    assert other.remembered == one.remembered
    assert torch.allclose(other.bounds, one.bounds, rtol=1e-12)
    for loss, norm in [*values, (9.0, 1.0), (2.0, 9.0)]:
        assert judged(one, loss, norm) == judged(other, loss, norm)
    smaller = Spikes(5.0, 4, CPU)
    smaller.remember(*one.remembered)
    assert smaller.remembered[0] == one.remembered[0][-4:]


class NoReads(TorchDispatchMode):
    """Refuses what a host waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "local_scalar_dense" not in str(func), func
        return func(*args, **(kwargs or {}))


def test_no_number_is_read_by_the_host() -> None:
    spikes = Spikes(6.0, 8, CPU)
    with NoReads():
        for _ in range(12):
            spikes.judge(torch.ones(()), torch.ones(()))
    with pytest.raises(AssertionError, match="local_scalar_dense"), NoReads():
        spikes.judge(torch.ones(()), torch.ones(())).any().item()
