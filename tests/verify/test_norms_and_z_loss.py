"""Norms of queries and keys and the z-loss give one answer at any layout, and go on from any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.layout.frozen import frozen_weights
from megallama.layout.names import parse_layout
from megallama.verify.shrink import shrink
from megallama.verify.verify import verify
from tests.verify.test_parity import TIED, assert_all_equal, debug_config

BOTH = ("model.qk_norm=true", "optimizer.z_loss=1e-2")
ONE_KEY_HEAD = ("model.num_attention_heads=8", "model.num_key_value_heads=1")


def check(layouts: str, *overrides: str, dtype: str = "fp32", resume: bool = False) -> None:
    parsed = [parse_layout(name) for name in layouts.split()]
    assert_all_equal(verify(debug_config(*BOTH, *overrides), parsed, dtype=dtype, resume=resume))


def test_a_normalised_run_gives_the_answer_of_one_process() -> None:
    check("tp2-nosp", *ONE_KEY_HEAD)


PARITY = [
    pytest.param("tp2 tp2-nosp tp4 tp4-nosp-zero3", [], id="tp"),
    pytest.param("tp2 tp4-nosp tp4-zero3", [*ONE_KEY_HEAD, TIED], id="fewer kv heads than tp, tied"),
    pytest.param("pp2 pp2-zbvzerobubble pp2-dualpipev-full tp2-pp2-zbvzerobubble", [], id="pp"),
    pytest.param("cp2 cp2-ulysses tp2-cp2", ["data.document_mask=true"], id="cp within documents"),
    pytest.param("dp2-zero2 dp2-zero3 tp2-dp2-zero3-full acc4", [], id="dp"),
    pytest.param("tp2 dp2-zero3 pp2", ["train.objective=masked"], id="masked"),
    pytest.param("tp2 pp2-zbvzerobubble", ['train.freeze=["*_norm.weight", lm_head.weight]'], id="frozen"),
]


@pytest.mark.layouts
@pytest.mark.parametrize(("layouts", "overrides"), PARITY)
def test_every_layout_of_a_normalised_run_gives_the_answer_of_one_process(layouts: str, overrides: list[str]) -> None:
    check(layouts, *overrides, resume=True)


@pytest.mark.layouts
def test_layouts_of_a_normalised_run_give_the_answer_of_one_process_in_bf16() -> None:
    check("tp2 tp4-nosp cp2 pp2-zbvzerobubble dp2-zero3", dtype="bf16")


def test_the_shrunk_run_keeps_both_and_what_is_frozen_of_them() -> None:
    config = debug_config(*BOTH, 'train.freeze=["*.q_norm.weight"]')
    small = shrink(config, Path("a"), Path("b"), 1, "fp32", 3)
    assert (small.model.qk_norm, small.optimizer.z_loss) == (True, 1e-2)
    assert frozen_weights(small.model, small.train.freeze) == {
        f"model.layers.{layer}.self_attn.q_norm.weight" for layer in range(3)
    }
