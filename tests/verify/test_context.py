"""A sequence that several ranks share: one answer in both modes, with every other axis, schedule and mask."""

from __future__ import annotations

import pytest

from megallama.layout.names import parse_layout
from megallama.verify.verify import verify
from tests.verify.test_parity import GQA, TIED, assert_all_equal, debug_config

WITHIN = "data.document_mask=true"
MASKED = "train.objective=masked"


def check(layouts: str, *overrides: str, dtype: str = "fp32", resume: bool = False) -> None:
    parsed = [parse_layout(name) for name in layouts.split()]
    assert_all_equal(verify(debug_config(*overrides), parsed, dtype=dtype, resume=resume))


def test_a_shared_sequence_gives_the_answer_of_one_process() -> None:
    check("cp2 cp2-ulysses")


PARITY = [
    pytest.param("cp2 cp4 cp2-ulysses cp4-ulysses cp2-acc4", [], id="alone"),
    pytest.param("tp2-cp2 tp2-cp2-nosp tp2-cp2-ulysses", [], id="with tp"),
    pytest.param("pp2-cp2 pp2-interleaved1f1b-cp2-acc4 pp2-dualpipev-cp2-ulysses", [], id="with pp"),
    pytest.param("pp2-zbvzerobubble-cp2-acc4-full tp2-cp2-selective", [TIED], id="tied, recomputed"),
    pytest.param("dp2-cp2 dp2-cp2-zero2 dp2-cp2-zero3-ulysses-full", [], id="with dp"),
    pytest.param("tp4-cp2 cp2", [GQA], id="fewer kv heads than tp"),
]
APART = [
    pytest.param("cp2 cp4-ulysses tp2-cp2 pp2-zbvzerobubble-cp2", [WITHIN], id="within documents"),
    pytest.param("cp2 cp2-ulysses", [MASKED], id="masked"),
    pytest.param("cp4 cp2-ulysses-full", [MASKED, WITHIN], id="masked within documents"),
]


@pytest.mark.layouts
@pytest.mark.parametrize(("layouts", "overrides"), PARITY + APART)
def test_every_layout_of_a_shared_sequence_gives_the_answer_of_one_process(layouts: str, overrides: list[str]) -> None:
    check(layouts, *overrides, resume="cp4" in layouts.split())


@pytest.mark.layouts
@pytest.mark.parametrize(("layouts", "overrides"), PARITY)
def test_every_layout_of_a_shared_sequence_gives_the_answer_of_one_process_in_bf16(
    layouts: str, overrides: list[str]
) -> None:
    check(layouts, *overrides, dtype="bf16")
