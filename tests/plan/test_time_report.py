"""Step time, speed and cost of a run, from its configuration to the rows of a plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.counts import flops_per_token
from megallama.layout.stages import stages
from megallama.plan.hardware import built_in_hardware
from megallama.plan.memory.traffic import stage_traffic
from megallama.plan.report.table import Part, as_dictionary, render
from megallama.plan.report.time import time_parts
from megallama.plan.time.kernels import kernel_work
from megallama.plan.time.step_time import step_time
from megallama.plan.time.workload import workload

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = built_in_hardware()["h100-80g"]


def config_7b(*overrides: str) -> RunConfig:
    return load_config(CONFIGS / "7b.yaml", overrides)


def rows(parts: list[Part], key: str) -> dict[str, str]:
    return {row.key: row.how for part in parts if part.key == key for row in part.rows}


def test_a_run_becomes_the_step_that_it_trains() -> None:
    work = workload(config_7b(), 128)
    assert (work.tp, work.pp, work.dp, work.world_size) == (2, 4, 16, 128)
    assert work.tokens == 1024 * 2048
    assert sum(work.stages) == work.shape.layers == 32
    assert work.head == 3
    full = workload(config_7b("train.recompute=full", "train.compile=true", "train.dtype=fp32"), 128)
    down = 4096 * 11008 / (4 * 4096**2 + 3 * 4096 * 11008)
    again = (
        full.matmul_recompute_fraction,
        full.attention_recompute_fraction,
        full.elementwise_recompute_fraction,
        full.layer_recompute_fraction,
    )
    assert again == (pytest.approx(1 - down), 1, 1, 1)
    assert (full.fused, full.element_bytes, full.gradient_bytes) == (True, 4, 4)
    back = workload(config_7b("parallel.schedule=zbvzerobubble", "train.recompute=full"), 128)
    assert (back.head, back.chunks) == (0, 2)
    assert back.attention_recompute_fraction == 2, "in each part of a backward"
    assert (work.fused_norm, workload(config_7b("train.device=cpu"), 128).fused_norm) == (True, False)
    assert workload(config_7b("parallel.tensor=8", "model.num_key_value_heads=4"), 128).gathers_heads


def test_rows_add_up_and_agree_with_the_step_time() -> None:
    found = as_dictionary(time_parts(config_7b(), 128, H100, price=2.5))
    step = dict(found["step_time"])
    total = step.pop("total")
    assert total == step_time(workload(config_7b(), 128), H100).total
    assert step.pop("compute") == pytest.approx(step["matmul"] + step["attention"] + step["memory"])
    assert sum(step.values()) == pytest.approx(total)
    assert set(step) == {"matmul", "attention", "memory", "tensor", "pipeline", "bubble", "data", "optimizer"}
    cost = found["cost"]
    assert found["speed"]["tokens_per_second"] == pytest.approx(1024 * 2048 / total)
    assert cost["hours"] == pytest.approx(300_000 * total / 3600)
    assert cost["gpu_hours"] == pytest.approx(128 * cost["hours"])
    assert cost["money"] == pytest.approx(2.5 * cost["gpu_hours"])
    assert cost["energy_mwh"] == pytest.approx(cost["gpu_hours"] * 700 * 1.1 / 1e6)


def test_mfu_is_that_of_training_whatever_pads_the_vocabulary() -> None:
    config = config_7b("parallel.tensor=8", "parallel.pipeline=1")
    assert workload(config, 8).shape.padding == 768
    found = as_dictionary(time_parts(config, 8, H100))["speed"]
    flops = flops_per_token(config.model, config.data.sequence_length, "full")
    assert found["mfu_full"] == pytest.approx(100 * found["tokens_per_second_per_gpu"] * flops / 989.4e12)


def test_rows_show_their_arithmetic_and_only_what_there_is() -> None:
    parts = time_parts(config_7b(), 128, H100)
    assert rows(parts, "step_time")["matmul"].endswith(" FLOPs at 59.5% of 989.4 TFLOP/s")
    assert rows(parts, "cost")["gpu_hours"].endswith(" h * 128")
    assert "money" not in rows(parts, "cost")
    assert "hfu" not in rows(parts, "speed")
    alone = time_parts(load_config(CONFIGS / "110m.yaml"), 1, H100)
    assert set(rows(alone, "step_time")) == {"matmul", "attention", "memory", "compute", "optimizer", "total"}
    assert "hfu" in rows(time_parts(config_7b("train.recompute=full"), 128, H100), "speed")


@pytest.mark.parametrize("words", [(), ("parallel.sequence=false",), ("parallel.schedule=interleaved1f1b",)])
def test_the_arithmetic_of_each_term_of_a_step_comes_to_its_seconds(words: tuple[str, ...]) -> None:
    config = config_7b(*words)
    parts = time_parts(config, 128, H100)
    how, step = rows(parts, "step_time"), as_dictionary(parts)["step_time"]
    work = workload(config, 128)
    kernels = kernel_work(work)[0 if work.chunks == 1 else 3]
    slowest = max(kernel_work(work), key=lambda rank: rank.matmul_flops)
    assert f"16 micro-batches, {16 * slowest.matmul_flops:.4g} FLOPs at " in how["matmul"]
    assert f"16 micro-batches, {16 * kernels.attention_flops:.4g} FLOPs at half" in how["attention"]

    def figures(key: str) -> list[float]:
        return [float(word) for word in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]\d+)?(?![\w.])", how[key])]

    batches, number, size, ranks, link, wait = figures("tensor")
    halves = 1 if work.sequence_parallel else 2
    found = batches * number * halves * (size * 1e6 * (ranks - 1) / ranks / (link * 1e9) + wait * 1e-6 / 2)
    assert found == pytest.approx(step["tensor"], rel=1e-3)
    every = stages(config)
    traffic = stage_traffic(config, every[0], len(every)).number
    if work.chunks == 1:
        large = ("all_gather", "reduce_scatter") if work.sequence_parallel else ("all_reduce",)
        assert number == sum(traffic[kind] for kind in large)
    batches, number, size, link, wait = figures("pipeline")
    assert batches * number * (size * 1e6 / (link * 1e9) + wait * 1e-6) == pytest.approx(step["pipeline"], rel=1e-3)
    of_work, of_messages = figures("bubble")[1:]
    bubble = of_work * (step["compute"] + step["tensor"]) + of_messages * step["pipeline"]
    assert bubble == pytest.approx(step["bubble"], rel=1e-3)
    reduced, gathered, copies, link, number, wait = figures("data")
    sent = (2 * reduced + gathered) * (copies - 1) / copies
    assert sent / link + number * wait * 1e-6 == pytest.approx(step["data"], rel=1e-3)
    each, parameters, copies, bandwidth = figures("optimizer")
    assert each * parameters / copies / (bandwidth * 1e12) == pytest.approx(step["optimizer"], rel=1e-3)
    assert max(map(len, how.values())) <= 100


def test_zero_3_shows_what_it_scatters_and_gathers() -> None:
    parts = time_parts(config_7b("zero.stage=3", "parallel.pipeline=1"), 128, H100)
    assert rows(parts, "step_time")["data"].startswith("zero3: reduce-scatter ")
    assert " + all-gather " in rows(parts, "step_time")["data"]


def test_hours_and_money_are_read_without_powers_of_ten() -> None:
    parts = time_parts(config_7b(), 128, H100, 15e12, price=2.5)
    text, cost = render(parts, 160), as_dictionary(parts)["cost"]
    assert cost["money"] > 1e6
    assert f"{cost['money']:,.2f}\n" in text
    assert f"{cost['gpu_hours']:,.2f} h * 2.5" in text


def test_tokens_and_software_of_the_caller_are_taken() -> None:
    a100 = built_in_hardware()["a100-80g"]
    fast, slow = (as_dictionary(time_parts(config_7b(), 128, a100, 2e12, software=name)) for name in (None, "llama-2"))
    assert fast["cost"]["steps"] == slow["cost"]["steps"] == -(-2 * 10**12 // (1024 * 2048))
    assert fast["step_time"]["total"] < slow["step_time"]["total"]


def test_an_illegal_run_and_an_unknown_figure_are_refused() -> None:
    with pytest.raises(UserError, match="nearest legal: world size 8 or 16"):
        time_parts(config_7b(), 9, H100)
    with pytest.raises(UserError, match=r"^mi300x\.efficiency is not known"):
        time_parts(config_7b(), 128, built_in_hardware()["mi300x"])


def test_fp32_is_planned_where_the_peak_is_of_fp32() -> None:
    config = config_7b("train.dtype=fp32", "parallel.pipeline=1", "parallel.tensor=1", "train.global_batch_size=4")
    with pytest.raises(UserError, match=r"^train\.dtype=fp32 has no step time on h100-80g, whose peak is of"):
        time_parts(config, 1, H100)
    measured = {"peak_tflops": 1.5, "memory_tb_s": 0.05, "efficiency": {"torch-2.13": 0.8}}
    cpu = built_in_hardware()["cpu"].model_copy(update=measured)
    assert as_dictionary(time_parts(config, 1, cpu))["step_time"]["total"] > 100
