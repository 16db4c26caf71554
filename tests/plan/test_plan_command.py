"""`megallama plan`: the table and the dictionary, and what it refuses."""

from __future__ import annotations

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
from megallama.plan.cli import Asked, plan
from megallama.system.new_file import write_new_files

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


@pytest.mark.parametrize("quantity", ["1000", "1e30"])
def test_every_legal_quantity_has_a_finite_plan(quantity: str) -> None:
    given = ["--params", quantity, "--tokens", quantity]
    for arguments in (given, given[:2], given[2:], ["--flops", quantity], [str(CONFIGS / "7b.yaml"), *given[2:]]):
        found = planned(*arguments)
        assert all(math.isfinite(row) for part in found.values() for key, row in part.items() if key != "note")


def test_budgets_without_a_run() -> None:
    optimum = planned("--flops", "1e21")["optimum_for_flops"]
    assert optimum["parameters Besiroglu et al."] == pytest.approx(2.778e9, rel=2e-4)
    assert optimum["loss"] == pytest.approx(2.3052, abs=5e-5)
    tokens = planned("--params", "7B")["optimum_for_size"]["tokens Besiroglu et al."]
    assert tokens == pytest.approx(20.63 * 7e9, rel=3e-4)
    size = planned("--tokens", "144.4B")["optimum_for_tokens"]["parameters Besiroglu et al."]
    assert size == pytest.approx(7e9, rel=1e-3)
    both = planned("--params", "7e9", "--tokens", "1T")
    assert set(both) == {"loss", "optimum_for_size", "shape", "recipe"}


def test_a_budget_comes_with_the_price_of_smaller_models_a_shape_and_a_recipe() -> None:
    found = planned("--flops", "1e21")
    assert 0 < found["over_training"]["penalty 1/2"] < found["over_training"]["penalty 1/8"]
    assert found["shape"]["parameters"] == pytest.approx(2.778e9, rel=0.02)
    assert found["shape"]["hidden_size"] == found["shape"]["num_attention_heads"] * found["shape"]["head_dim"]
    assert found["recipe"]["learning_rate"] == 3e-4


def test_a_size_with_its_tokens_takes_gpu_hours_days_and_money() -> None:
    sized = ["--params", "7B", "--tokens", "1T", "--gpu", "a100"]
    found = planned(*sized, "--gpus", "1024", "--price", "1.5")["cost"]
    hours = 6 * 7e9 * 1e12 / (312e12 * 0.4 * 3600)
    assert found["gpu_hours"] == pytest.approx(hours)
    assert found["days"] == pytest.approx(hours / 1024 / 24)
    assert found["money"] == pytest.approx(1.5 * hours)
    assert set(planned(*sized)["cost"]) == {"peak", "mfu", "gpu_hours"}
    assert planned(*sized, "--mfu", "0.5")["cost"]["gpu_hours"] == pytest.approx(0.8 * hours)


def test_a_ratio_of_tokens_to_parameters_is_taken_from_the_caller() -> None:
    found = planned("--params", "7B", "--tokens-per-param", "20", "--gpu", "h100")
    assert found["loss"]["tokens_per_parameter"] == pytest.approx(20)
    assert found["cost"]["gpu_hours"] == pytest.approx(6 * 7e9 * 140e9 / (989.4e12 * 0.4 * 3600))


def test_the_entry_function_takes_one_thing() -> None:
    assert list(inspect.signature(inspect.unwrap(plan)).parameters) == list(fields_of(Asked))
    assert [line for line in inspect.getsource(cli).splitlines() if line.startswith("def plan(")] == [
        "def plan(asked: Asked) -> None:"
    ]


def fields_of(cls: type[Asked]) -> list[str]:
    return [field.name for field in fields(cls)]


def test_the_shape_takes_the_vocabulary_that_is_given() -> None:
    shape = planned("--params", "8.03B", "--vocab", "128256")["shape"]
    assert (shape["num_hidden_layers"], shape["hidden_size"], shape["intermediate_size"]) == (32, 4096, 14336)
    assert shape["parameters"] == 8_030_261_248


def test_a_size_without_a_shape_is_planned_all_the_same_and_says_why() -> None:
    result = CliRunner().invoke(app, ["--params", "3e6"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "\nNo Llama of this size\n3e+06 parameters" in result.stdout
    assert "3e+06 parameters have no Llama shape within 2% for a vocabulary of 32000, tied" in result.stdout
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
    assert found["optimum_for_flops"] == pytest.approx(planned("--flops", f"{flops!r}")["optimum_for_flops"])


def test_data_that_repeats_more_than_four_times_is_warned_about() -> None:
    for arguments in (["--tokens", "2T"], [str(CONFIGS / "7b.yaml"), "--tokens", "2T"]):
        often = CliRunner().invoke(app, [*arguments, "--unique-tokens", "400B"], env={"COLUMNS": "200"}).stdout
        seldom = CliRunner().invoke(app, [*arguments, "--unique-tokens", "500B"], env={"COLUMNS": "200"}).stdout
        assert "Warning: the data repeats 5.0 times." in often
        assert "Warning" not in seldom
        data = planned(*arguments, "--unique-tokens", "400B")["data"]
        assert data["epochs"] == 5
        assert data["note"].startswith("Warning: the data repeats 5.0 times.")
        assert "note" not in planned(*arguments, "--unique-tokens", "500B")["data"]


def test_the_excerpt_in_the_docs_is_what_is_printed() -> None:
    page = (CONFIGS.parent / "docs" / "planning.md").read_text()
    excerpt = page[page.index("Compute-optimal for 1e+21") :].partition("\n...")[0].splitlines()
    printed = CliRunner().invoke(app, ["--flops", "1e21"], env={"COLUMNS": "110"}).stdout.splitlines()
    assert [line.rstrip() for line in printed[: len(excerpt)]] == excerpt
    assert len(excerpt) == 8


@pytest.mark.parametrize(("words", "width"), [("--price 2", "80"), ("--explain", "110")])
def test_the_plan_in_the_docs_is_what_is_printed(words: str, width: str) -> None:
    page = (CONFIGS.parent / "docs" / "planning.md").read_text()
    command = f"megallama plan configs/7b.yaml --gpus 128 --gpu a100-80g {words}\n"
    excerpt = page.partition(command)[2].lstrip("`\n").partition("```")[0].splitlines()
    arguments = [str(CONFIGS / "7b.yaml"), *command.split()[3:]]
    printed = CliRunner().invoke(app, arguments, env={"COLUMNS": width}).stdout.splitlines()
    assert len(excerpt) > 10
    assert [line for line in excerpt if line not in (*printed, "...")] == []


def test_the_figures_in_the_docs_are_those_of_their_commands() -> None:
    page = " ".join((CONFIGS.parent / "docs" / "planning.md").read_text().split())
    pair = planned("--params", "8.03B", "--tokens", "15T")["loss"]
    assert f"are {pair['penalty']:.3f} nats above the {pair['optimal_parameters'] / 1e9:.0f}e9 on 1.48T" in page
    ratios = [tokens / 7e9 for key, tokens in planned("--params", "7B")["optimum_for_size"].items() if "," in key]
    assert [round(ratio) for ratio in ratios] == [20, 22]


def test_the_table_of_a_budget_names_sources_and_its_arithmetic() -> None:
    result = CliRunner().invoke(app, ["--gpus", "64", "--days", "30"], env={"COLUMNS": "200"})
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [],
            "nothing to plan; give a CONFIG such as configs/7b.yaml, or --flops, --params, --tokens, or --gpus with",
        ),
        (["--unique-tokens", "1T"], "nothing to plan for --unique-tokens=1T; give a CONFIG"),
        ([str(CONFIGS / "7b.yaml"), "--days", "30", "--gpus", "64"], "--days=30 contradicts "),
        ([str(CONFIGS / "7b.yaml"), "--gpus", "0"], "--gpus=0 is not a whole number from 1 to 10000000; nearest"),
        ([str(CONFIGS / "7b.yaml"), "--unique-tokens", "-1"], "--unique-tokens=-1 is not a number from 1"),
        (["--flops", "1e21", "--params", "7B"], "--flops=1e21 contradicts --params=7B, since either sizes the other"),
        (["--timeline", "--flops", "1e21"], "--timeline does not go with --flops=1e21; leave one of them out"),
        (["--timeline"], "--timeline needs a CONFIG such as configs/7b.yaml"),
        (["--params", "seven"], "--params=seven is not a number from 1 to 1e30; write it as 7e9 or 7B"),
        (["--flops", "-1"], "--flops=-1 is not a number from 1"),
        (["--tokens", "inf"], "--tokens=inf is not a number from 1"),
        (["--params", "nan"], "--params=nan is not a number from 1"),
        (["--params", "1e308"], "--params=1e308 is not a number from 1"),
        (["--tokens", "1e308"], "--tokens=1e308 is not a number from 1"),
        (["--params", "7B", "--tokens", "1e308", "--json"], "--tokens=1e308 is not a number from 1"),
        (["--params", "1e-300", "--tokens", "1e-300"], "--params=1e-300 is not a number from 1"),
        ([str(CONFIGS / "7b.yaml"), "--params", "7B"], "--params=7B contradicts "),
        ([str(CONFIGS / "7b.yaml"), "--gpus", "9"], "nearest legal: world size 8 or 16"),
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


def test_what_a_device_leaves_over_is_said() -> None:
    found = planned(str(CONFIGS / "7b.yaml"), "--gpus", "128", "--gpu", "h100")
    assert found["fit"]["needed"] == found["memory"]["total"]
    assert found["fit"]["free"] == found["fit"]["usable"] - found["fit"]["needed"] > 0


def test_the_fastest_layout_is_written_as_a_config_and_a_job_that_stand(tmp_path: Path) -> None:
    config, job = tmp_path / "run.yaml", tmp_path / "run.sh"
    words = [str(CONFIGS / "1b.yaml"), "--search", "--gpus", "16", "--gpu", "h100", "--json"]
    result = CliRunner().invoke(app, [*words, "--write", str(config), "--sbatch", str(job)])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert len(found["layouts"]) == 10
    written = planned(str(config), "--gpus", "16", "--gpu", "h100")
    first, speed = found["layouts"]["rank_1"], written["speed"]
    assert written["step_time"]["total"] == first["seconds"]
    assert written["memory"]["total"] == first["bytes"]
    assert speed["tokens_per_second_per_gpu"] == first["tokens_per_second_per_gpu"]
    assert speed["mfu_full"] == first["mfu"]
    assert first["tp"] * first["pp"] * first["dp"] == 16
    assert {"zero_stage", "schedule", "chunks", "micro_batch_size", "recompute"} < set(first)
    assert found["tried"] == found["fits"] + sum(one["layouts"] for one in found["rejected"].values())
    assert {"reason", "places", "layouts"} == set(found["rejected"]["class_1"])
    assert first["gpu_hours"] == pytest.approx(written["cost"]["gpu_hours"])
    assert "#SBATCH --nodes=2\n" in job.read_text()
    assert f'slurm/run.sh" {config}' in job.read_text()
    again = CliRunner().invoke(app, [*words, "--write", str(config)])
    assert str(again.exception) == f"{config} exists, and is not written over; give another name, or remove it"


SEARCH = ["--search", "--gpus", "8", "--gpu", "h100"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--write", "both", "--sbatch", "./both"], "--sbatch=both is the file of --write as well; give another name"),
        (["--write", ""], "--write=. is a folder; give the name of a file, as run.yaml"),
        (["--write", "new.yaml", "--sbatch", "old.sh"], "old.sh exists, and is not written over; give another name"),
        (["--write", "new.yaml", "--sbatch", "no/a.sh"], "no/a.sh cannot be written (No such file or directory); give"),
        (["--write", "n" * 300], f"{'n' * 300} cannot be written (File name too long); give a path in a folder"),
        (["train.dtype=fp32", "--write", "new.yaml"], "train.dtype=fp32 has no step time on h100-80g, whose peak is"),
    ],
)
def test_what_a_search_cannot_write_or_price_is_said_before_it_begins(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megallama.plan.search.search.search", lambda *_: pytest.fail("it searched"))
    Path("old.sh").write_text("mine")
    result = CliRunner().invoke(app, [str(CONFIGS / "1b.yaml"), *SEARCH, *words])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(sentence)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.sh", "mine")]


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no/run\.sh cannot be written \(No such file or directory\); give a path"):
        write_new_files({tmp_path / "run.yaml": b"a", tmp_path / "no" / "run.sh": b"b"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "flag"),
    [
        *(
            (mode, flag)
            for mode in ("--timeline", "--check", "--plot=o.png")
            for flag in ("--software=x", "--price=x", "--unique-tokens=x", "--tokens=1T")
        ),
        *((mode, flag) for mode in ("--timeline", "--check") for flag in ("--gpu=x", "--hardware=none")),
        *(("--search", flag) for flag in ("--unique-tokens=1", "--flops=1e21", "--days=3")),
        *(("--timeline", flag) for flag in ("--days=30", "--mfu=0.4", "--vocab=1", "--params=7B", "--price=")),
    ],
)
def test_a_flag_that_a_mode_does_not_use_is_refused(mode: str, flag: str) -> None:
    words = [str(CONFIGS / "7b.yaml"), "--gpus", "8", mode, flag]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == f"{mode.partition('=')[0]} does not go with {flag}; leave one of them out"


def test_gpus_of_a_file_are_sized_for(tmp_path: Path) -> None:
    file, words = tmp_path / "mine.yaml", ["--gpus", "64", "--days", "30"]
    file.write_text("my-card: {peak_tflops: 100}\ncpu: {peak_tflops: 2}\n")
    for name, peak in (("my-card", 100e12), ("cpu", 2e12)):
        found = planned(*words, "--gpu", name, "--hardware", str(file))["compute"]
        assert found["peak"] == peak
        assert found["flops"] == pytest.approx(64 * 30 * 86_400 * peak * 0.4)
    for rest in (words, ["--flops", "1e21"]):
        result = CliRunner().invoke(app, [*rest, "--hardware", str(file)])
        assert isinstance(result.exception, UserError)
        assert str(result.exception).startswith(f"--hardware={file} needs --gpu with one of its names; add it")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpu", "h1000"], "the GPU h1000 is not known; did you mean h100"),
        (["--price", ""], "--price= needs a kind of GPU; add --gpu h100, or leave it out"),
        (["--price", "2"], "--price=2 needs a kind of GPU; add --gpu h100, or leave it out"),
        (["--gpu", "h100", "--price", "-2"], "--price=-2 is not a number from 0 to"),
        (["--gpu", "h100", "--price", "inf"], "--price=inf is not a number from 0 to 1e9; nearest legal: 1e9"),
        (["--gpu", "h100", "--software", "2031"], "--software=2031 is not known; known: megallama, "),
        (["--gpu", "cpu"], "cpu."),
        (["--search"], "--search needs how many GPUs of which kind; add --gpus 64 --gpu h100"),
        (["--search", "--timeline"], "--timeline does not go with --search; leave one of them out"),
        (["--write", "a.yaml"], "--write=a.yaml is for the best layout of --search; give --search"),
        (["--search", "--sbatch", "a.sh"], "--sbatch=a.sh runs the config that --write names; give --write run.yaml"),
        (["--search", "--gpus", "8", "--gpu", "h100", "--write", "no/a.yaml"], "no/a.yaml cannot be written (No such"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(words: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, [str(CONFIGS / "1b.yaml"), *words])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(sentence)
