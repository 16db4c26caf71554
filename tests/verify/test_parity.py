"""The promise "any layout, one answer": real processes, real DeepSpeed, every layout against one process."""

from __future__ import annotations

import pytest

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.layout.names import parse_layout
from megallama.verify.report import as_json
from megallama.verify.verify import Report, verify

GQA = "model.num_key_value_heads=1"
TIED = "model.tie_word_embeddings=true"
MORE = pytest.mark.layouts


def debug_config(*overrides: str) -> RunConfig:
    return load_config("configs/debug.yaml", overrides)


def assert_all_equal(report: Report) -> None:
    assert report.passed, as_json(report)


@pytest.mark.parametrize(
    ("layouts", "overrides"),
    [
        pytest.param("tp2 tp2-nosp tp4 tp4-nosp", [], id="tensor parallel, with and without sequence parallel"),
        pytest.param("dp2 dp2-zero2 dp2-zero3", [], id="dp 2 at ZeRO 1, 2, 3"),
        pytest.param("dp4 dp4-zero2 dp4-zero3", [], id="dp 4 at ZeRO 1, 2, 3", marks=MORE),
        pytest.param("tp2-dp2 tp2-dp2-zero3 tp2-dp2-acc4", [], id="tp 2 x dp 2 at ZeRO 1 and 3", marks=MORE),
        pytest.param("zero2 zero3 acc4 acc4-zero2 acc4-zero3", [], id="one process at ZeRO 1, 2, 3 and accumulation 4"),
        pytest.param("tp2 tp4 dp2-zero3 tp2-zero3", [TIED], id="tied embeddings"),
        pytest.param("tp4 tp4-nosp tp4-zero3", [GQA, TIED], id="fewer kv heads than tp"),
        pytest.param("tp2 tp4", ["model.head_dim=32", GQA], id="head_dim apart, one head gathered from slices"),
        pytest.param("acc4-host dp2-host tp2-host", [], id="the optimizer on the host"),
        pytest.param("pp2-host pp2-zbvzerobubble-acc4-host", [], id="the optimizer on the host, stages"),
        pytest.param("selective full tp2-selective tp2-full tp2-zero3-full-acc4", [], id="recomputation", marks=MORE),
        pytest.param("tp2 dp2", ["model.init=xavier_uniform"], id="xavier initialisation"),
    ],
)
def test_every_layout_gives_the_answer_of_one_process_in_fp32(layouts: str, overrides: list[str]) -> None:
    assert_all_equal(verify(debug_config(*overrides), [parse_layout(name) for name in layouts.split()]))


@pytest.mark.parametrize(
    ("layouts", "overrides"),
    [
        pytest.param("acc4 dp2 dp2-zero2 dp2-zero3 tp2", [], id="one of each"),
        pytest.param("acc4-host pp2-dualpipev-host", [], id="the optimizer on the host"),
        pytest.param("dp2-host-acc4 tp2-host pp2-host", [], id="more", marks=MORE),
        pytest.param("zero2 zero3 acc4-zero3 selective full", [], id="one process", marks=MORE),
        pytest.param("dp4 tp2-nosp tp4 tp2-dp2 tp2-dp2-zero3", [], id="more ranks", marks=MORE),
        pytest.param("tp2 tp4 dp2", [TIED, GQA], id="tied embeddings, fewer kv heads than tp", marks=MORE),
    ],
)
def test_every_layout_gives_the_answer_of_one_process_in_bf16(layouts: str, overrides: list[str]) -> None:
    assert_all_equal(verify(debug_config(*overrides), [parse_layout(name) for name in layouts.split()], dtype="bf16"))
