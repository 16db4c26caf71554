"""Step time, speed and cost of a run, from its configuration to the rows of a plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import built_in_hardware
from megallama.layout.budget import planned_tokens
from megallama.layout.counts import flops_per_token
from megallama.plan.report.table import Part, render, with_notes
from megallama.plan.report.time import check_type, time_parts
from megallama.plan.time.communication import Group, collective_seconds
from megallama.plan.time.software import Machine, known_software, machine
from megallama.plan.time.step_time import rank_works, slowest_work, step_time

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = machine(built_in_hardware()["h100-80g"])


def config_7b(*overrides: str) -> RunConfig:
    return load_config(CONFIGS / "7b.yaml", overrides)


def planned(
    config: RunConfig, world_size: int, on: Machine, tokens: float | None = None, price: float | None = None
) -> list[Part]:
    length = planned_tokens(config, tokens)
    return time_parts(config, world_size, on, step_time(config, world_size, on), length, price)


def rows(parts: list[Part], key: str) -> dict[str, str]:
    return {row.key: row.how for part in parts if part.key == key for row in part.rows}


def test_rows_add_up_and_agree_with_the_step_time() -> None:
    found = with_notes(planned(config_7b(), 128, H100, price=2.5))
    step = dict(found["step_time"])
    total = step.pop("total")
    assert total == step_time(config_7b(), 128, H100).total
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
    found = with_notes(planned(config, 8, H100))["speed"]
    flops = flops_per_token(config.model, config.data.sequence_length, "full")
    assert found["mfu_full"] == pytest.approx(100 * found["tokens_per_second_per_gpu"] * flops / 989.4e12)


def test_rows_show_their_arithmetic_and_only_what_there_is() -> None:
    parts = planned(config_7b(), 128, H100)
    assert rows(parts, "step_time")["matmul"].endswith(" FLOPs at 59.0% of 989.4 TFLOP/s")
    assert rows(parts, "cost")["gpu_hours"].endswith(" h * 128")
    assert "money" not in rows(parts, "cost")
    assert "hfu" not in rows(parts, "speed")
    alone = planned(load_config(CONFIGS / "110m.yaml"), 1, H100)
    assert set(rows(alone, "step_time")) == {"matmul", "attention", "memory", "compute", "optimizer", "total"}
    assert "hfu" in rows(planned(config_7b("train.recompute=full"), 128, H100), "speed")


@pytest.mark.parametrize("words", [(), ("parallel.sequence=false",), ("parallel.schedule=interleaved1f1b",)])
def test_the_arithmetic_of_each_term_of_a_step_comes_to_its_seconds(words: tuple[str, ...]) -> None:
    config = config_7b(*words)
    parts = planned(config, 128, H100)
    how, step = rows(parts, "step_time"), with_notes(parts)["step_time"]
    work = slowest_work(rank_works(config, H100, 16), config, H100)
    assert how["matmul"].startswith(f"16 micro-batches * {work.kernels.matmul_flops:.4g} FLOPs at ")
    assert how["attention"] == f"16 micro-batches * {work.kernels.attention_flops:.4g} FLOPs at 0.5 of that rate"

    def collectives(words: str) -> float:
        """Seconds of `(8 all-gathers of 16.8 MB + ...) over 8 ranks at 360 GB/s, 40 us an all-reduce`."""
        each = re.findall(r"(\d+) (\S+)s of ([\d.]+) ([MG])B", words)
        ((ranks, link, wait),) = re.findall(r"over (\d+) ranks at ([\d.]+) GB/s, (\d+) us", words)
        found = 0.0
        for number, kind, size, unit in each:
            halves = 2 if kind == "all-reduce" else 1
            sent = float(size) * (1e9 if unit == "G" else 1e6) * (int(ranks) - 1) / int(ranks)
            found += int(number) * halves * (sent / float(link) / 1e9 + int(wait) * 1e-6 / 2)
        return found

    def figures(key: str) -> list[float]:
        return [float(word) for word in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]\d+)?(?![\w.])", how[key])]

    shown, norms = how["tensor"].partition("; of norms' gradients ")[::2]
    hidden = collective_seconds(H100.gpu, Group(2), work.beside)
    assert hidden < work.beside_flops / H100.matmul_flops, "matmuls of these widths take longer than what they hide"
    once = collective_seconds(H100.gpu, Group(2), work.once)
    assert bool(norms) == bool(work.once.number) == config.parallel.sequence_parallel
    assert 16 * (collectives(shown) - hidden) + once == pytest.approx(step["tensor"], rel=1e-3)
    assert how["data"].endswith(", sums behind the last backward but for the last group")
    sums = collectives(re.sub(r" \+ [^)]*\)", ")", how["data"]))  # in nine groups
    assert collectives(how["data"]) - 8 / 9 * sums == pytest.approx(step["data"], rel=1e-3)
    batches, number, size, link, wait = figures("pipeline")
    assert batches * number * (size * 1e6 / (link * 1e9) + wait * 1e-6) == pytest.approx(step["pipeline"], rel=1e-3)
    waiting = figures("bubble")[1]
    assert waiting * (step["compute"] + step["tensor"] + step["pipeline"]) == pytest.approx(step["bubble"], rel=1e-3)
    each, parameters, copies, bandwidth = figures("optimizer")
    assert each * parameters / copies / (bandwidth * 1e12) == pytest.approx(step["optimizer"], rel=1e-3)


def test_zero_3_shows_what_it_scatters_and_gathers() -> None:
    parts = planned(config_7b("zero.stage=3", "parallel.pipeline=1"), 128, H100)
    assert re.match(
        r"ZeRO-3: \(\d+ reduce-scatters of [\d.]+ MB \+ \d+ all-gathers of ", rows(parts, "step_time")["data"]
    )


def test_every_collective_of_the_product_is_in_the_time() -> None:
    """As many as `--check` counts on the real layers, whatever the heads are."""
    words = ["parallel.tensor=8", "model.num_key_value_heads=4", "train.global_batch_size=512", "parallel.pipeline=1"]
    config = load_config(CONFIGS / "8b.yaml", words)
    how = rows(planned(config, 64, H100), "step_time")["tensor"]
    assert re.findall(r"(\d+) (\S+)s of", how) == [
        ("258", "all-gather"),
        ("194", "reduce-scatter"),
        ("2", "all-reduce"),
    ]


def test_an_assumed_mfu_gives_speed_and_cost_where_no_constant_is_known() -> None:
    found = with_notes(planned(config_7b(), 128, machine(built_in_hardware()["mi300x"], mfu=0.35)))
    assert list(found["step_time"]) == ["total"]
    assert found["speed"]["mfu_full"] == pytest.approx(35)
    assert found["cost"]["days"] > 1


def test_hours_and_money_are_read_without_powers_of_ten() -> None:
    parts = planned(config_7b(), 128, H100, 15e12, price=2.5)
    text, cost = render(parts, 160), with_notes(parts)["cost"]
    assert cost["money"] > 1e6
    assert f"{cost['money']:,.2f}\n" in text
    assert f"{cost['gpu_hours']:,.2f} h * 2.5" in text


def test_tokens_and_software_of_the_caller_are_taken() -> None:
    a100 = built_in_hardware()["a100-80g"]
    names = ("megallama", "llama-2")
    found = [with_notes(planned(config_7b(), 128, machine(a100, known_software()[name]), 2e12)) for name in names]
    assert {each["cost"]["steps"] for each in found} == {-(-2 * 10**12 // (1024 * 2048))}
    assert found[0]["step_time"]["matmul"] < found[1]["step_time"]["matmul"]
    assert found[0]["step_time"]["data"] > found[1]["step_time"]["data"], "which overlaps it"


def test_an_illegal_run_and_an_unknown_figure_are_refused() -> None:
    with pytest.raises(UserError, match="nearest legal: world size 8 or 16"):
        planned(config_7b(), 9, H100)
    with pytest.raises(UserError, match=r"^mi300x\.efficiency is not known"):
        machine(built_in_hardware()["mi300x"])


def test_fp32_is_planned_where_the_peak_is_of_fp32() -> None:
    config = config_7b("train.dtype=fp32", "parallel.pipeline=1", "parallel.tensor=1", "train.global_batch_size=4")
    with pytest.raises(UserError, match=r"^train\.dtype=fp32 has no step time on h100-80g, whose peak is of"):
        check_type(config, H100.gpu)
    measured = {"peak_tflops": 1.5, "memory_tb_s": 0.05, "efficiency": {"torch-2.13": 0.8}}
    cpu = machine(built_in_hardware()["cpu"].model_copy(update=measured))
    assert with_notes(planned(config, 1, cpu))["step_time"]["total"] > 100
