"""What a step time comes to: figures that are in print come out of the printed ones they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.hardware.gpus import built_in_hardware
from megallama.plan.report.time import run_cost, speed

CONFIG = Path(__file__).parents[2] / "configs" / "8b.yaml"
HARDWARE = built_in_hardware()
H100 = HARDWARE["h100-80g"]


def llama_8b(*words: str) -> RunConfig:
    return load_config(CONFIG, ["data.sequence_length=8192", "train.global_batch_size=16", *words])


def test_mfu_of_torchtitan_comes_out_of_its_tokens_per_second() -> None:
    """6,667 tokens per second and GPU are 39 % (pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md)."""
    found = speed(llama_8b("train.recompute=none"), 8, H100, 2 * 8192 / 6667)
    assert found.tokens_per_second_per_gpu == pytest.approx(6667)
    assert found.tokens_per_second == pytest.approx(8 * 6667)
    assert found.mfu_full == pytest.approx(0.390, abs=5e-4)
    assert found.mfu_causal == pytest.approx(0.347, abs=5e-4)
    assert found.hfu == found.mfu_full
    assert found.mfu_attainable == pytest.approx(found.mfu_full * 989.4 / 794.5)


def test_recomputation_counts_as_hardware_flops_only() -> None:
    """Full: 6 V h + 8 (N - V h) + 16 L h s of 6 N + 12 L h s (arXiv 2205.05198, appendix A)."""
    plain, found = (speed(llama_8b(f"train.recompute={kind}"), 8, H100, 1.0) for kind in ("none", "full"))
    head, matmuls, attention = 128256 * 4096, 7_504_658_432, 32 * 4096 * 8192
    expected = (6 * head + 8 * (matmuls - head) + 16 * attention) / (6 * matmuls + 12 * attention)
    assert found.mfu_full == plain.mfu_full
    assert found.hfu / found.mfu_full == pytest.approx(expected)


def test_hours_and_energy_of_llama_65b_come_out_of_its_tokens_per_second() -> None:
    """1.4e12 tokens at 380 per second and GPU: 1,022,362 GPU hours, 449 MWh, 21 days (arXiv 2302.13971, table 15)."""
    config = llama_8b("data.sequence_length=2048", "train.global_batch_size=2048")
    seconds = config.tokens_per_step / 2048 / 380
    found = run_cost(config, 2048, machine(HARDWARE["a100-80g"]), seconds, 1.4e12, price=2.0)
    assert found.gpu_hours == pytest.approx(1_022_362, rel=2e-3)
    assert found.energy_mwh == pytest.approx(449, rel=3e-3)
    assert found.hours / 24 == pytest.approx(20.8, abs=0.05)
    assert found.money == pytest.approx(2 * found.gpu_hours)


def test_a_last_step_that_is_not_full_is_a_step() -> None:
    assert run_cost(llama_8b(), 8, machine(HARDWARE["h200"]), 1.0, 3 * 16 * 8192 + 1).steps == 4


def test_what_is_not_known_is_left_out() -> None:
    found = run_cost(llama_8b(), 8, machine(HARDWARE["gh200-96g"]), 1.0, 1e9)
    assert (found.money, found.energy_mwh) == (None, None)
    assert speed(llama_8b(), 8, HARDWARE["h100-nvl"], 1.0).mfu_attainable is None
