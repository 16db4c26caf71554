"""Matrix products of linear layers in fp8 (arXiv 2209.05433), with the scales and kernels of torchao."""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.float8.float8_ops import addmm_float8_unwrapped
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

from megallama.model.layers import Matmuls

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
"""Inputs and weights have three bits of mantissa; gradients two, and the range of fp16."""


class Fp8Matmuls(Matmuls):
    """Each factor is scaled so that its largest number is fp8's, and rounded to it; sums are fp32, results as inputs.

    Where `emulated`, the rounded factors are multiplied in fp32, on any device.
    """

    def __init__(self, *, emulated: bool) -> None:
        self.emulated = emulated

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        product = self._product(x.flatten(0, -2), FORWARD, weight.t(), FORWARD, fast=True)
        return product.unflatten(0, x.shape[:-1])

    def by_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        return self._product(grad.flatten(0, -2), BACKWARD, weight, FORWARD).unflatten(0, grad.shape[:-1])

    def by_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        return self._product(grad.flatten(0, -2).t(), BACKWARD, x.flatten(0, -2), FORWARD)

    def _product(self, a: Tensor, a_type: torch.dtype, b: Tensor, b_type: torch.dtype, fast: bool = False) -> Tensor:
        """a [m, k] @ b [k, n]; a `fast` sum may lose a few of fp32's bits, as forward passes stand it."""
        a_scale, b_scale = tensor_to_scale(a, a_type), tensor_to_scale(b, b_type)
        a8, b8 = to_fp8_saturated(a.float() * a_scale, a_type), to_fp8_saturated(b.float() * b_scale, b_type)
        if self.emulated:
            return ((a8.float() / a_scale) @ (b8.float() / b_scale)).to(a.dtype)
        # The kernel reads the left factor by rows and the right one by columns.
        by_columns = b8.t().contiguous().t()
        result: Tensor = addmm_float8_unwrapped(
            a8.contiguous(), a_scale, by_columns, b_scale, a.dtype, use_fast_accum=fast
        )
        return result
