"""A GPU's kernels of attention and norm, without their arithmetic: one operator each for forward and backward.

On a CPU torch has others for both. These read and write what a GPU's do, the norm's backward a second time what its
kernel for the weight reads; what they return has no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megallama.model import attention as model_attention


@torch.library.custom_op("gpu::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """q [batch, heads, queries, head_dim], k and v perhaps of fewer heads -> the same as q, and a number per row."""
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("gpu::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.custom_op("gpu::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x, normed, and a number for each row."""
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("gpu::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """The gradient of x."""
    return torch.empty_like(x)


@torch.library.custom_op("gpu::rms_norm_weight_backward", mutates_args=())
def rms_norm_weight_backward(grad: Tensor, x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """The gradient of the weight."""
    return torch.empty_like(weight)


def _keep_attention(ctx: Any, inputs: Any, output: Any) -> None:
    *read, ctx.causal = inputs
    ctx.set_materialize_grads(False)  # of the rows nobody asks for one
    ctx.save_for_backward(*read, *output)


def _attention_gradients(ctx: Any, grad: Tensor, _: Any) -> Any:
    return *attention_backward(grad, *ctx.saved_tensors, ctx.causal), None


def _keep_norm(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _norm_gradients(ctx: Any, grad: Tensor, _: Any) -> Any:
    return rms_norm_backward(grad, *ctx.saved_tensors), rms_norm_weight_backward(grad, *ctx.saved_tensors)


for each in (attention, attention_backward, rms_norm, rms_norm_backward, rms_norm_weight_backward):
    each.register_fake(each._init_fn)
attention.register_autograd(_attention_gradients, setup_context=_keep_attention)
rms_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)


def _square(q: Any, k: Any, causal: bool) -> float:
    """FLOPs of one product of scores; a causal kernel skips half of them."""
    batch, heads, queries, width = q
    return 2.0 * batch * heads * queries * k[2] * width * (0.5 if causal else 1.0)


@register_flop_formula(torch.ops.gpu.attention)
def _attention_flops(q: Any, k: Any, v: Any, causal: bool, **_: Any) -> float:
    return 2 * _square(q, k, causal)


@register_flop_formula(torch.ops.gpu.attention_backward)
def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, out: Any, rows: Any, causal: bool, **_: Any) -> float:
    """Five products: it computes the scores again (arXiv 2205.14135, appendix B)."""
    return 5 * _square(q, k, causal)


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Inside, torch.nn.functional and the model take these, but for a norm that is compiled, which a compiler fuses."""
    composite = F.rms_norm

    def norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        if torch.compiler.is_compiling():
            return composite(x, shape, weight, eps)
        return rms_norm(x, weight)[0]

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, **_: object) -> Tensor:
        return attention(q, k, v, is_causal)[0]

    blockwise = partial(attend, is_causal=True)  # which a CPU takes
    with (
        patch.multiple(F, rms_norm=norm, scaled_dot_product_attention=attend),
        patch.object(model_attention, "blockwise_attention", blockwise),
    ):
        yield
