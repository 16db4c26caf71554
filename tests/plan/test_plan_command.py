"""`megallama plan`: the table and the dictionary, and what it refuses."""

from __future__ import annotations

import ast
import inspect
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from megallama.errors import UserError
from megallama.plan import cli
from megallama.plan.asked import Asked
from megallama.plan.cli import plan

CONFIGS = Path(__file__).parents[2] / "configs"
app = typer.Typer()
app.command()(plan)


def planned(*arguments: str) -> dict[str, dict[str, Any]]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.exception
    found: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return found


def test_7b_on_128_gpus() -> None:
    found = planned(str(CONFIGS / "7b.yaml"), "--gpus", "128")
    assert found["parameters"]["total"] == 6_738_415_616
    assert found["parameters"]["matmul"] == 6_607_077_376
    assert found["batch"]["dp_size"] == 16
    assert found["batch"]["gradient_accumulation_steps"] == 16
    assert found["batch"]["tokens"] == 300_000 * 1024 * 2048
    assert found["flops"]["per_token_full"] == 6 * 6_607_077_376 + 12 * 32 * 4096 * 2048
    assert len(found["memory_by_pipeline_rank"]) == 4
    assert found["memory"]["total"] == max(found["memory_by_pipeline_rank"].values())


def test_the_table_shows_the_arithmetic() -> None:
    result = CliRunner().invoke(app, [str(CONFIGS / "7b.yaml"), "--gpus", "128", "--explain"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    for words in ("6,738,415,616", "3 * 4096 * 11008", "1024 / (4 * 16)", "GiB", "loss above that of the best size"):
        assert words in result.stdout


def test_tokens_take_the_place_of_the_steps_wherever_a_length_is_said() -> None:
    found = planned(str(CONFIGS / "7b.yaml"), "--gpus", "128", "--gpu", "a100", "--tokens", "15T")
    assert found["batch"]["steps"] == found["cost"]["steps"] == 7_152_558
    assert found["batch"]["tokens"] == 15 * 10**12
    assert found["batch"]["tokens_per_parameter"] == pytest.approx(2226, abs=0.1)
    chosen = planned(str(CONFIGS / "8b.yaml"), "train.steps=chinchilla")["batch"]
    assert chosen["tokens"] == chosen["steps"] * chosen["tokens_per_step"]


def test_overrides_recomputation_and_tokens_change_the_plan() -> None:
    path = str(CONFIGS / "8b.yaml")
    plain, other = planned(path), planned(path, "train.recompute=full", "--tokens", "15T", "--gpus", "16")
    assert "per_token_hardware" not in plain["flops"]
    assert other["flops"]["per_token_hardware"] > other["flops"]["per_token_full"]
    assert other["loss"]["loss"] == pytest.approx(2.0215, abs=5e-5)
    assert other["loss"]["penalty"] == pytest.approx(2.0215 - 1.9679, abs=1e-4)
    assert plain["loss"]["penalty"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("quantity", ["1e7", "1e30"])
def test_every_legal_quantity_has_a_finite_plan(quantity: str) -> None:
    given = ["--params", quantity, "--tokens", quantity]
    for arguments in (given, given[:2], given[2:], ["--flops", quantity], [str(CONFIGS / "7b.yaml"), *given[2:]]):
        found = planned(*arguments)
        assert all(math.isfinite(row) for part in found.values() for key, row in part.items() if key != "note")


def test_the_entry_function_has_one_parameter_which_typer_sees_as_its_fields() -> None:
    functions = [node for node in ast.parse(inspect.getsource(cli)).body if isinstance(node, ast.FunctionDef)]
    (entry,) = [node for node in functions if node.name == "plan"]
    assert ast.unparse(entry.args) == "asked: Asked"
    assert list(inspect.signature(plan).parameters) == [field.name for field in fields(Asked)]


@pytest.mark.parametrize(("words", "width"), [("--price 2", "80"), ("--explain", "110")])
def test_the_plan_in_the_docs_is_what_is_printed(words: str, width: str) -> None:
    page = (CONFIGS.parent / "docs" / "planning.md").read_text()
    command = f"megallama plan configs/7b.yaml --gpus 128 --gpu a100-80g {words}\n"
    excerpt = page.partition(command)[2].lstrip("`\n").partition("```")[0].splitlines()
    arguments = [str(CONFIGS / "7b.yaml"), *command.split()[3:]]
    printed = CliRunner().invoke(app, arguments, env={"COLUMNS": width}).stdout.splitlines()
    assert len(excerpt) > 10
    assert [line for line in excerpt if line not in (*printed, "...")] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to plan; give a CONFIG such as configs/7b.yaml, or --flops, --params, --tokens, or --days with"),
        ([str(CONFIGS / "7b.yaml"), "--gpus", "0"], "--gpus=0 is not a whole number from 1 to 10000000; nearest"),
        (["--params", "7B", "--tokens", "1e308", "--json"], "--tokens=1e308 is not a number from 1"),
        (["--params", "7B", "--gpu", "cpu"], "cpu.peak_tflops is not known; give it in "),
        ([str(CONFIGS / "7b.yaml"), "--gpus", "9"], "nearest legal: world size 8 or 16"),
        ([str(CONFIGS / "7b.yaml"), "--gpu", "h1000"], "the GPU h1000 is not known; did you mean h100"),
        ([str(CONFIGS / "7b.yaml"), "--price", ""], "--price= needs --gpu; add --gpu h100, or leave it out"),
        ([str(CONFIGS / "7b.yaml"), "--gpu", "h100", "--price", "inf"], "--price=inf is not a number from 0 to 1e9; "),
        ([str(CONFIGS / "7b.yaml"), "--gpu", "h100", "--software", "2031"], "--software=2031 is not known; known: "),
        ([str(CONFIGS / "7b.yaml"), "--search"], "--search needs how many GPUs of which kind; add --gpus 64 --gpu h1"),
        (
            [str(CONFIGS / "1b.yaml"), "--search", "--gpus", "8", "--gpu", "h100", "--write", "no/a.yaml"],
            "no/a.yaml cannot be written (No such",
        ),
    ],
)
def test_mistakes_reach_the_caller_as_one_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert sentence in str(result.exception)


def test_a_kind_of_gpu_adds_time_speed_cost_and_single_changes() -> None:
    found = planned(str(CONFIGS / "7b.yaml"), "--gpus", "128", "--gpu", "a100", "--price", "2")
    step, cost = found["step_time"], found["cost"]
    assert cost["hours"] == pytest.approx(300_000 * step["total"] / 3600)
    assert cost["money"] == pytest.approx(2 * cost["gpu_hours"])
    assert 0.3 < found["speed"]["mfu_full"] / 100 < 0.6
    assert found["changes"]["parallel.pipeline=2"] < step["total"] < found["changes"]["train.recompute=full"]
    assert "step_time" not in planned(str(CONFIGS / "7b.yaml"), "--gpus", "128")


def test_a_run_that_does_not_fit_is_planned_and_then_refused_with_what_would() -> None:
    words = [str(CONFIGS / "7b.yaml"), "train.micro_batch_size=16", "--gpus", "128", "--gpu", "a100-40g"]
    result = CliRunner().invoke(app, [*words, "--explain"], env={"COLUMNS": "160"})
    assert "Memory on one rank" in result.stdout
    assert "\nDoes not fit NVIDIA A100 SXM 40 GB\n" in result.stdout
    assert isinstance(result.exception, UserError)
    assert "nearest that fits: train.micro_batch_size=" in str(result.exception)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpu", "b200"], "b200.efficiency is not known; assume a speed by --mfu 0.4, calibrate with a run"),
        (["--gpu", "mi300x"], "mi300x.efficiency is not known"),
        (["--gpu", "h100", "train.dtype=fp32"], "train.dtype=fp32 has no step time on h100-80g"),
        (["--gpu", "cpu"], "cpu."),
    ],
)
def test_without_a_step_time_the_rest_is_planned_and_then_refused(words: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, [str(CONFIGS / "7b.yaml"), "--gpus", "128", *words, "--json"])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(sentence)
    found = json.loads(result.stdout)
    assert {"parameters", "batch", "flops", "memory", "loss"} < set(found)
    assert found["step_time"] == {"note": f"{result.exception}."}
    assert ("fit" in found) == ("cpu" not in words)


@pytest.mark.parametrize("gpu", ["h100", "mi300x"])
def test_an_assumed_mfu_takes_the_place_of_a_prediction_whether_or_not_there_is_a_constant(gpu: str) -> None:
    found = planned(str(CONFIGS / "7b.yaml"), "--gpus", "128", "--gpu", gpu, "--mfu", "0.35", "--price", "2")
    assert list(found["step_time"]) == ["total"]
    assert found["speed"]["mfu_full"] == pytest.approx(35)
    assert found["cost"]["hours"] == pytest.approx(300_000 * found["step_time"]["total"] / 3600)
    assert found["cost"]["money"] == pytest.approx(2 * found["cost"]["gpu_hours"])
    assert "fit" in found and "changes" not in found, "it is the same for every layout"


def test_what_a_device_leaves_over_is_said() -> None:
    found = planned(str(CONFIGS / "7b.yaml"), "--gpus", "128", "--gpu", "h100")
    assert found["fit"]["needed"] == found["memory"]["total"]
    assert found["fit"]["free"] == found["fit"]["usable"] - found["fit"]["needed"] > 0
