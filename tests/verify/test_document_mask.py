"""A run within documents gives one answer at any layout, and verify sees where one does not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.attention.flex_attention
from torch import Tensor

import megallama.model.llama
import megallama.train.pipeline
from megallama.layout.names import parse_layout
from megallama.model.attention import AttentionCore, FusedAttention, flex_attention
from megallama.verify.shrink import shrink
from megallama.verify.verify import Plant, verify
from tests.verify.test_parity import assert_all_equal, debug_config

WITHIN = "data.document_mask=true"


def check(layouts: str, dtype: str = "fp32", *overrides: str, resume: bool = False) -> None:
    parsed = [parse_layout(name) for name in layouts.split()]
    assert_all_equal(verify(debug_config(WITHIN, *overrides), parsed, dtype=dtype, resume=resume))


def test_a_run_within_documents_gives_the_answer_of_one_process() -> None:
    check("pp2-zbvzerobubble")


@pytest.mark.layouts
@pytest.mark.parametrize(
    ("layouts", "dtype"),
    [
        ("tp2 tp2-nosp tp4-selective", "fp32"),
        ("pp2 pp2-interleaved1f1b-acc4", "fp32"),
        ("dp2 dp2-zero2 dp4-zero3", "fp32"),
        ("tp2-dp2-zero3-full acc4", "fp32"),
        ("pp2-dp2 pp2-dualpipev tp2-pp2-zbvzerobubble-full", "fp32"),
        ("tp2 pp2-interleaved1f1b-acc4 dp2-zero2 tp2-pp2-zbvzerobubble-full", "bf16"),
    ],
)
def test_every_layout_of_a_run_within_documents_gives_the_answer_of_one_process(layouts: str, dtype: str) -> None:
    check(layouts, dtype, resume=dtype == "fp32")


@pytest.mark.layouts
def test_a_masked_run_within_documents_gives_the_answer_of_one_process() -> None:
    check("tp2 pp2-dualpipev dp2-zero3-full", "fp32", "train.objective=masked")


def compiled_attention() -> None:
    """As on a GPU, forward and backward, by torch's own definition of its kernels."""
    compiled = torch.compile(flex_attention, backend="aot_eager")

    def within(self: FusedAttention, documents: Tensor, head_dim: int) -> AttentionCore:
        return partial(compiled, block_mask=self.block_mask(documents))

    patch.object(FusedAttention, "within", within).start()
    torch.nn.attention.flex_attention._validate_device = lambda *_: None  # which refuses a backward on a CPU


@pytest.mark.layouts
@pytest.mark.parametrize("layouts", ["pp2-dualpipev", "pp2-zbvzerobubble-full pp2 tp2-selective full"])
def test_compiled_attention_goes_through_every_kind_of_backward(layouts: str) -> None:
    parsed = [parse_layout(name) for name in layouts.split()]
    assert_all_equal(verify(debug_config(WITHIN), parsed, resume=False, plant=compiled_attention))


def test_the_shrunk_run_keeps_the_mask() -> None:
    small = [shrink(debug_config(*words), Path("a"), Path("b"), 1, "fp32") for words in ([], [WITHIN])]
    assert [config.data.document_mask for config in small] == [False, True]


def documents_for_the_first_stage_alone() -> None:
    original = megallama.train.pipeline.Pipeline._inputs

    def forget(self: megallama.train.pipeline.Pipeline, batches: Any) -> Any:
        arguments, named = original(self, batches)
        return arguments, named if arguments else {key: each for key, each in named.items() if key != "documents"}

    patch.object(megallama.train.pipeline.Pipeline, "_inputs", forget).start()


def layers_that_see_all() -> None:
    original = megallama.model.llama.DecoderLayer.forward

    def forget(
        self: megallama.model.llama.DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, core: Any = None
    ) -> Tensor:
        return original(self, x, cos, sin)

    patch.object(megallama.model.llama.DecoderLayer, "forward", forget).start()


@pytest.mark.parametrize(
    ("layout", "plant"),
    [
        ("pp2", documents_for_the_first_stage_alone),
        pytest.param("full", layers_that_see_all, marks=pytest.mark.layouts),
    ],
)
def test_a_planted_bug_is_reported(layout: str, plant: Plant) -> None:
    report = verify(debug_config(WITHIN), [parse_layout(layout)], plant=plant)
    assert "loss" in report.verdicts[0].failures
