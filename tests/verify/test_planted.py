"""Bugs planted on purpose: each must be seen, or the parity tests prove nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import megallama.model.layers
import megallama.train.engine
import megallama.train.gradient_sums
import megallama.train.loop
import megallama.train.zero
from megallama.layout.names import parse_layout
from megallama.parallel import collectives
from megallama.verify.verify import Plant, verify
from tests.verify.test_parity import debug_config


def no_reduction_after_row_parallel() -> None:
    megallama.model.layers.reduce_from = lambda x, axis: x


def no_reduction_of_norm_gradients() -> None:
    megallama.train.zero.sum_shares = lambda gradients, tp: None


def shards_not_marked_for_the_norm() -> None:
    unmarked = megallama.model.layers._weight

    def forget(rows: int, columns: int) -> nn.Parameter:
        weight = unmarked(rows, columns)
        del weight.tensor_model_parallel  # type: ignore[attr-defined]
        return weight

    megallama.model.layers._weight = forget


def mean_of_means() -> None:
    def count_own_labels(batches: list[object], mesh: object) -> Tensor:
        own = sum(int((b.labels != -100).sum()) for b in batches)  # type: ignore[attr-defined]
        return torch.tensor(float(own * mesh.data.size))  # type: ignore[attr-defined]

    megallama.train.step.count_labels = count_own_labels


def no_reduction_over_data_parallel_ranks() -> None:
    megallama.train.gradient_sums.GradientSums._send = lambda self: None  # type: ignore[method-assign]


def weight_gradients_of_a_split_backward_lost() -> None:
    """As if nobody knew that they pass ZeRO's hooks."""

    def forget(self: megallama.train.zero.ZeroOne, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None

    megallama.train.zero.ZeroOne.take = forget  # type: ignore[method-assign]


def one_rank_moves_a_norm() -> None:
    """By so little that no measure but the equality of copies can see it."""
    step = megallama.train.engine.Engine.step

    def step_and_move(self: megallama.train.engine.Engine, *given: Any) -> None:
        step(self, *given)
        if torch.distributed.get_rank() == 1:
            self._engine.module.get_parameter("stages.0.norm.weight").data.mul_(1 + 1e-6)

    megallama.train.engine.Engine.step = step_and_move  # type: ignore[method-assign]


def gradients_of_keys_that_others_read_lost() -> None:
    def own_part(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank].contiguous(), None, None

    patch.object(collectives._Gather, "backward", staticmethod(own_part)).start()


def one_rank_raises() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    megallama.train.loop.train_step = fail


@pytest.mark.parametrize(
    ("layout", "dtype", "plant", "seen"),
    [
        ("tp2-nosp", "fp32", no_reduction_after_row_parallel, "loss"),
        ("pp2-dualpipev", "bf16", weight_gradients_of_a_split_backward_lost, "gradient"),
        ("pp2-zbvzerobubble", "bf16", weight_gradients_of_a_split_backward_lost, "gradient"),
        ("pp2-dualpipev", "fp32", weight_gradients_of_a_split_backward_lost, "gradient"),
        ("pp2-dp2", "bf16", no_reduction_over_data_parallel_ranks, "gradient"),
        ("cp2", "fp32", gradients_of_keys_that_others_read_lost, "gradient"),
        ("tp2", "fp32", no_reduction_of_norm_gradients, "gradient"),
        ("tp2", "bf16", no_reduction_of_norm_gradients, "gradient"),
        ("tp2-zero2", "fp32", no_reduction_of_norm_gradients, "gradient"),
        ("tp2-zero3", "fp32", no_reduction_of_norm_gradients, "gradient"),
        ("tp2", "fp32", shards_not_marked_for_the_norm, "first_norm"),
        ("tp2", "bf16", shards_not_marked_for_the_norm, "first_norm"),
        ("dp2", "fp32", mean_of_means, "loss"),
        ("cp2", "fp32", mean_of_means, "loss"),
        ("dp2", "fp32", no_reduction_over_data_parallel_ranks, "gradient"),
        ("dp2", "bf16", no_reduction_over_data_parallel_ranks, "gradient"),
        ("dp2", "fp32", one_rank_raises, "RuntimeError: planted"),
    ],
)
def test_a_planted_bug_is_reported(layout: str, dtype: str, plant: Plant, seen: str) -> None:
    report = verify(debug_config(), [parse_layout(layout)], dtype=dtype, plant=plant)
    assert not report.passed
    assert seen in report.verdicts[0].failures


@pytest.mark.parametrize("layout", ["tp2", "dp2-zero2"])
def test_a_copy_that_is_not_the_same_bits_on_one_rank_is_reported(layout: str) -> None:
    report = verify(debug_config(), [parse_layout(layout)], plant=one_rank_moves_a_norm)
    assert report.verdicts[0].failures == ["copy stages.0.norm.weight differs between ranks"]
