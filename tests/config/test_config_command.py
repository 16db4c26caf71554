"""`megallama config`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megallama.cli import config
from megallama.config.deepspeed import deepspeed_config
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
app = typer.Typer()
app.command()(config)


def test_the_run_is_printed_before_its_deepspeed_dictionary(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(CONFIGS / "7b.yaml"), "train.seed=7", "--gpus", "128"])
    assert result.exit_code == 0
    text, _, engine = result.stdout.partition("# DeepSpeed, on 128 ranks, dp 16:\n")
    (tmp_path / "again.yaml").write_text(text)
    run = load_config(CONFIGS / "7b.yaml", ["train.seed=7"])
    assert load_config(tmp_path / "again.yaml") == run
    assert json.loads(engine) == deepspeed_config(run, 16)


def test_the_dictionary_is_that_of_all_ranks_that_zero_cuts_over() -> None:
    words = [str(CONFIGS / "debug.yaml"), "parallel.context=2", "--gpus", "4"]
    printed = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert printed["deepspeed"]["train_batch_size"] == 2 * 4
    assert "# DeepSpeed, on 4 ranks, dp 2, cp 2:\n" in CliRunner().invoke(app, words).stdout


def test_json_holds_both() -> None:
    result = CliRunner().invoke(app, [str(CONFIGS / "debug.yaml"), "--json", "train.seed=7"])
    printed = json.loads(result.stdout)
    assert printed["config"]["train"]["seed"] == 7
    assert printed["deepspeed"]["zero_optimization"]["stage"] == 1
    assert RunConfig.model_validate(printed["config"]) == load_config(CONFIGS / "debug.yaml", ["train.seed=7"])


def test_the_schema_needs_no_run() -> None:
    result = CliRunner().invoke(app, ["--schema"])
    assert result.exit_code == 0
    assert "ParallelConfig" in json.loads(result.stdout)["$defs"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no CONFIG given; name a file such as configs/quickstart.yaml"),
        ([str(CONFIGS / "7b.yaml"), "--gpus", "12"], "nearest legal: world size 8 or 16"),
        ([str(CONFIGS / "7b.yaml"), "train.lr=3"], "did you mean optimizer.lr?"),
        (["configs/no.yaml"], "there is no file configs/no.yaml"),
    ],
)
def test_mistakes_reach_the_caller_as_one_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert sentence in str(result.exception)
