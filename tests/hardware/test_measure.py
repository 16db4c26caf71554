"""The peak of a CPU, which MFU and calibrated plans are relative to."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from megallama.hardware.measure import matmul_flops, measured_matmul

WIDTH = 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peak_is_no_less_than_half_of_what_a_linear_layer_reaches(dtype: torch.dtype) -> None:
    """Or steps have an MFU of more than 1: a CPU without bf16 units multiplies some layouts seven times slower."""
    assert any(share_of_linear(dtype) > 0.5 for _ in range(3))  # other work on the machine comes and goes


def share_of_linear(dtype: torch.dtype) -> float:
    """The lower of two measured peaks, by what a linear layer reaches."""
    peaks = measured_matmul(torch.device("cpu"), dtype), matmul_flops(dtype)
    x, weight = (torch.randn(WIDTH, WIDTH, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        F.linear(x, weight)
        taken.append(time.perf_counter() - began)
    return min(peaks) * min(taken) / (2 * WIDTH**3)
