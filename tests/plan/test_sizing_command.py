"""`megallama plan` without a config: the parts that answer each question, and what training takes on GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.plan.test_plan_command import CONFIGS, app, planned


def test_budgets_without_a_run() -> None:
    optimum = planned("--flops", "1e21")["optimum_for_flops"]
    assert optimum["parameters Besiroglu et al."] == pytest.approx(2.778e9, rel=2e-4)
    assert optimum["loss"] == pytest.approx(2.3052, abs=5e-5)
    tokens = planned("--params", "7B")["optimum_for_size"]["tokens Besiroglu et al."]
    assert tokens == pytest.approx(20.63 * 7e9, rel=3e-4)
    size = planned("--tokens", "144.4B")["optimum_for_tokens"]["parameters Besiroglu et al."]
    assert size == pytest.approx(7e9, rel=1e-3)


CHOSEN, GIVEN = ["shape", "recipe"], ["loss", "optimum_for_size", "shape", "recipe"]
"""The parts where a fit chooses the size or its data, and where both follow from what was typed."""
SIZINGS: dict[str, tuple[str, list[str]]] = {
    "compute": ("--flops 1e21", ["optimum_for_flops", *CHOSEN]),
    "a size": ("--params 7B", ["optimum_for_size", *CHOSEN]),
    "data": ("--tokens 1T", ["optimum_for_tokens", *CHOSEN]),
    "a size with its data": ("--params 7B --tokens 1T", GIVEN),
    "a size at a ratio": ("--params 7B --tokens-per-param 20", GIVEN),
    "compute at a ratio": ("--flops 1e21 --tokens-per-param 20", GIVEN),
    "GPUs and days": ("--gpus 64 --gpu h100 --days 30", ["compute", "optimum_for_flops", *CHOSEN]),
    "GPUs and days at a ratio": ("--gpus 64 --gpu h100 --days 30 --tokens-per-param 20", ["compute", *GIVEN]),
    "a size on GPUs": ("--params 7B --gpu h100", ["optimum_for_size", "cost", "shape", "recipe"]),
}


@pytest.mark.parametrize("given", SIZINGS)
def test_each_question_has_its_parts_in_the_order_they_are_read(given: str) -> None:
    words, parts = SIZINGS[given]
    assert list(planned(*words.split())) == parts


def test_a_budget_comes_with_a_shape_and_a_recipe() -> None:
    found = planned("--flops", "1e21")
    assert found["shape"]["parameters"] == pytest.approx(2.778e9, rel=0.02)
    assert found["shape"]["hidden_size"] == found["shape"]["num_attention_heads"] * found["shape"]["head_dim"]
    assert found["recipe"]["learning_rate"] == 3e-4


PRICED = {
    "a size with its tokens": ("--params 7B --tokens 1T", 6 * 7e9 * 1e12),
    "a size at a ratio": ("--params 7B --tokens-per-param 20", 6 * 7e9 * 140e9),
    "data at a ratio": ("--tokens 140B --tokens-per-param 20", 6 * 7e9 * 140e9),
    "compute": ("--flops 1e21", 1e21),
    "compute at a ratio": ("--flops 1e21 --tokens-per-param 20", 1e21),
}


@pytest.mark.parametrize("given", PRICED)
def test_training_of_a_known_size_takes_gpu_hours_days_and_money(given: str) -> None:
    typed, flops = PRICED[given]
    words, hours = [*typed.split(), "--gpu", "a100"], flops / (312e12 * 0.4 * 3600)
    found = planned(*words, "--gpus", "1024", "--price", "1.5")["cost"]
    assert list(found) == ["peak", "mfu", "gpu_hours", "days", "money"]
    assert found["gpu_hours"] == pytest.approx(hours)
    assert found["days"] == pytest.approx(hours / 1024 / 24)
    assert found["money"] == pytest.approx(1.5 * hours)
    assert list(planned(*words)["cost"]) == ["peak", "mfu", "gpu_hours"]
    assert list(planned(*words, "--price", "0")["cost"]) == ["peak", "mfu", "gpu_hours", "money"]
    assert planned(*words, "--mfu", "0.5")["cost"]["gpu_hours"] == pytest.approx(0.8 * hours)


def test_the_cost_of_a_size_is_printed_with_its_arithmetic() -> None:
    words = ["--params", "7B", "--tokens", "1T", "--gpu", "a100", "--gpus", "1024", "--price", "1.5"]
    printed = CliRunner().invoke(app, words, env={"COLUMNS": "200"}).stdout
    cost = printed.partition("\nWhat it takes on a100\n")[2].partition("\n\n")[0]
    for words in ("4.2e+22 FLOPs / rate", "93,483 h / 1024 GPUs / 24, without stops", "93,483 h * 1.5", "140,224.36"):
        assert words in cost, words


def test_a_ratio_of_tokens_to_parameters_is_taken_from_the_caller() -> None:
    for words in ("--params 7B", "--tokens 140B", "--flops 5.88e21", "--gpus 64 --gpu h100 --days 30"):
        found = planned(*words.split(), "--tokens-per-param", "20")
        assert found["loss"]["tokens_per_parameter"] == pytest.approx(20)


def test_the_shape_takes_the_vocabulary_that_is_given() -> None:
    shape = planned("--params", "8.03B", "--vocab", "128256")["shape"]
    assert (shape["num_hidden_layers"], shape["hidden_size"], shape["intermediate_size"]) == (32, 4096, 14336)
    assert shape["parameters"] == 8_030_261_248


def test_a_size_without_a_shape_is_planned_all_the_same_and_says_why() -> None:
    result = CliRunner().invoke(app, ["--params", "3e6"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "\nNo Llama of this size\n3e+06 parameters" in result.stdout
    assert "3e+06 parameters have no Llama shape within 2% for a vocabulary of 32000" in result.stdout
    (note,) = planned("--params", "3e6")["shape"].values()
    assert note.startswith("3e+06 parameters have no Llama shape within 2%")


def test_small_learning_rates_keep_their_digits() -> None:
    result = CliRunner().invoke(app, ["--params", "405B"], env={"COLUMNS": "200"})
    assert "8e-05" in result.stdout


def test_gpus_and_days_are_planned_as_their_compute() -> None:
    found = planned("--gpus", "64", "--gpu", "h100-80g", "--days", "30")
    flops = 64 * 30 * 86_400 * 989.4e12 * 0.4
    assert found["compute"]["flops"] == pytest.approx(flops)
    assert found["compute"]["mfu"] == 0.4
    assert "money" not in found["compute"]
    assert (
        planned("--gpus", "64", "--gpu", "h100", "--days", "30", "--price", "2")["compute"]["money"] == 2 * 64 * 30 * 24
    )
    assert found["optimum_for_flops"] == pytest.approx(planned("--flops", f"{flops!r}")["optimum_for_flops"])


def test_the_excerpt_in_the_docs_is_what_is_printed() -> None:
    page = (CONFIGS.parent / "docs" / "planning.md").read_text()
    excerpt = page[page.index("Compute-optimal for 1e+21") :].partition("\n...")[0].splitlines()
    printed = CliRunner().invoke(app, ["--flops", "1e21"], env={"COLUMNS": "110"}).stdout.splitlines()
    assert [line.rstrip() for line in printed[: len(excerpt)]] == excerpt
    assert len(excerpt) == 8


def test_the_figures_in_the_docs_are_those_of_their_commands() -> None:
    page = " ".join((CONFIGS.parent / "docs" / "planning.md").read_text().split())
    pair = planned("--params", "8.03B", "--tokens", "15T")["loss"]
    assert f"are {pair['penalty']:.3f} nats above the {pair['optimal_parameters'] / 1e9:.0f}e9 on 1.48T" in page
    ratios = [tokens / 7e9 for key, tokens in planned("--params", "7B")["optimum_for_size"].items() if "," in key]
    assert [round(ratio) for ratio in ratios] == [20, 22]


def test_the_table_of_a_budget_names_sources_and_its_arithmetic() -> None:
    result = CliRunner().invoke(app, ["--gpus", "64", "--gpu", "h100", "--days", "30"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for words in (
        "30 days * 86400",
        "assumed, of 6 * N * D: 0.4 unless --mfu is given",
        "arXiv 2404.10102",
        "arXiv 2203.15556",
        "arXiv 2407.21783",
        "1.8169 + 482.01 / 2.373e+10^0.3478 + 2085.43 / 4.611e+11^0.3658",
        "model.num_key_value_heads",
    ):
        assert words in result.stdout, words


def test_gpus_of_a_file_are_sized_for(tmp_path: Path) -> None:
    file, words = tmp_path / "mine.yaml", ["--gpus", "64", "--days", "30"]
    file.write_text("my-card: {peak_tflops: 100}\ncpu: {peak_tflops: 2}\n")
    for name, peak in (("my-card", 100e12), ("cpu", 2e12)):
        found = planned(*words, "--gpu", name, "--hardware", str(file))["compute"]
        assert found["peak"] == peak
        assert found["flops"] == pytest.approx(64 * 30 * 86_400 * peak * 0.4)
