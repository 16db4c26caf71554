"""What a step time comes to: figures that are in print come out of the printed ones they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.hardware.gpus import built_in_hardware
from megallama.plan.report.time import run_cost, speed
from megallama.plan.time.software import machine
from megallama.plan.time.step_time import step_time

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


def test_a_ramp_costs_what_its_batches_cost_one_by_one() -> None:
    """96 sequences by 8, as many by 16, the rest by 32; also where the run ends before that."""
    on, length = machine(H100), 8192
    stages = ", ".join(f"{{global_batch_size: {batch}, until: {end * length}}}" for batch, end in ((8, 96), (16, 192)))
    ramp = f"train.batch_ramp=[{stages}]"
    config = llama_8b("train.global_batch_size=32", ramp, "parallel.tensor=8", "train.micro_batch_size=1")
    each = [
        step_time(
            llama_8b("parallel.tensor=8", "train.micro_batch_size=1", f"train.global_batch_size={batch}"), 8, on
        ).total
        for batch in (8, 16, 32)
    ]
    assert each[0] < 0.6 * each[1] < 0.36 * each[2]
    found = run_cost(config, 8, on, each[2], 384 * length)
    assert found.steps == 12 + 6 + 6
    assert found.hours == pytest.approx((12 * each[0] + 6 * each[1] + 6 * each[2]) / 3600)
    short = run_cost(config, 8, on, each[2], 100 * length)
    assert (short.steps, short.hours) == (13, pytest.approx((12 * each[0] + each[1]) / 3600))


def test_what_is_not_known_is_left_out() -> None:
    found = run_cost(llama_8b(), 8, machine(HARDWARE["gh200-96g"], mfu=0.4), 1.0, 1e9)
    assert (found.money, found.energy_mwh) == (None, None)
    assert speed(llama_8b(), 8, HARDWARE["h100-nvl"], 1.0).mfu_attainable is None
