"""Masked language modelling gives one answer at any layout, and verify sees where it does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import megallama.data.loader
import megallama.model.llama
from megallama.data.masking import Masking
from megallama.layout.names import parse_layout
from megallama.model.attention import causal_attention
from megallama.verify.shrink import shrink
from megallama.verify.verify import Plant, verify
from tests.verify.test_parity import assert_all_equal, debug_config

MASKED = "train.objective=masked"


def check(layouts: str, dtype: str = "fp32", *, resume: bool = False) -> None:
    parsed = [parse_layout(name) for name in layouts.split()]
    assert_all_equal(verify(debug_config(MASKED), parsed, dtype=dtype, resume=resume))


def test_a_masked_run_gives_the_answer_of_one_process() -> None:
    check("dp2-zero3-acc2 tp2-selective pp2-zbvzerobubble")


@pytest.mark.layouts
@pytest.mark.parametrize(
    ("layouts", "dtype"),
    [
        ("tp2-pp2 tp2-nosp tp4 pp2-interleaved1f1b-acc4", "fp32"),
        ("dp2-zero3 dp4-zero2 tp2-dp2-zero3-full acc4", "fp32"),
        ("pp2-dp2 pp2-dualpipev tp2-pp2-zbvzerobubble", "fp32"),
        ("tp2-pp2 dp2-zero3 pp2-dualpipev acc4", "bf16"),
    ],
)
def test_every_layout_of_a_masked_run_gives_the_answer_of_one_process_and_goes_on(layouts: str, dtype: str) -> None:
    check(layouts, dtype, resume=True)


def test_the_shrunk_run_keeps_the_objective() -> None:
    small = shrink(debug_config(MASKED, "train.mask_probability=0.3"), Path("a"), Path("b"), 1, "fp32")
    assert (small.train.objective, small.train.mask_probability, small.model.vocab_size) == ("masked", 0.3, 258)
    assert shrink(debug_config(), Path("a"), Path("b"), 1, "fp32").model.vocab_size == 257


def masks_of_its_own_on_each_rank() -> None:
    original = megallama.data.loader.Loader.__init__

    def forget(self: megallama.data.loader.Loader, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        assert isinstance(self._masking, Masking)
        self._masking = dataclasses.replace(self._masking, seed=self._dp_rank)

    patch.object(megallama.data.loader.Loader, "__init__", forget).start()


def causal_attention_after_all() -> None:
    patch.object(megallama.model.llama, "attention_of", lambda config, axes: causal_attention).start()


@pytest.mark.parametrize(
    ("layout", "plant"), [("dp2", masks_of_its_own_on_each_rank), ("pp2", causal_attention_after_all)]
)
def test_a_planted_bug_is_reported(layout: str, plant: Plant) -> None:
    report = verify(debug_config(MASKED), [parse_layout(layout)], plant=plant)
    assert "loss" in report.verdicts[0].failures
