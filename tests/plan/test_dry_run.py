"""`megallama plan --check`: the ledger against a rank's real stages at the full layout."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from megallama.errors import UserError
from megallama.plan.cli import plan
from megallama.plan.memory import dry_run

CONFIGS = Path(__file__).parents[2] / "configs"
app = typer.Typer()
app.command()(plan)
LONG = ["data.sequence_length=65536", "model.max_position_embeddings=65536", "train.global_batch_size=128"]
LAYOUTS = [
    ["7b.yaml", "--gpus", "128", "--rank", "0"],
    ["7b.yaml", "--gpus", "128", "train.recompute=full"],
    ["7b.yaml", "--gpus", "8", "parallel.sequence=false", "train.recompute=selective", "train.dtype=fp32"],
    ["405b.yaml", "--gpus", "16384", "train.global_batch_size=2048", "--rank", "7777"],
    ["7b.yaml", "--gpus", "128", "model.qk_norm=true"],
    ["8b.yaml", "parallel.tensor=16", "parallel.sequence=false", "model.qk_norm=true", "model.num_hidden_layers=4"],
    ["8b.yaml", "--gpus", "4", "parallel.context=4", "model.qk_norm=true", "parallel.tensor=1"],
    ["8b.yaml", "parallel.tensor=16", "train.recompute=full", "train.device=cpu", "model.num_hidden_layers=4"],
    ["405b.yaml", "--gpus", "16384", "parallel.context=16", *LONG, "--rank", "7777"],
    ["8b.yaml", "--gpus", "16", "parallel.context=8", *LONG, "train.recompute=full"],
    ["8b.yaml", "--gpus", "8", "parallel.context=4", "parallel.context_mode=ulysses", *LONG, "train.recompute=full"],
    ["8b.yaml", "--gpus", "4", "parallel.pipeline=4", "parallel.tensor=1", "parallel.schedule=dualpipev"],
    ["debug.yaml", "--gpus", "1", "parallel.tensor=1", "parallel.context_mode=ulysses"],
    ["debug.yaml", "--gpus", "2", "parallel.tensor=1", "parallel.context=2", "data.document_mask=true"],
]


def checked(*arguments: str) -> Result:
    return CliRunner().invoke(app, [str(CONFIGS / arguments[0]), "--check", *arguments[1:]])


@pytest.mark.parametrize("arguments", LAYOUTS, ids=lambda arguments: " ".join(arguments))
def test_the_ledger_is_what_a_rank_really_does(arguments: list[str]) -> None:
    result = checked(*arguments)
    assert result.exit_code == 0, (result.stdout, result.exception)
    assert "bytes kept for backward" in result.stdout and "differs" not in result.stdout
    if "parallel.tensor=1" not in arguments:
        assert "reduce_scatter, bytes" in result.stdout or "all_reduce, bytes" in result.stdout


def test_a_difference_is_marked_and_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = dry_run.stage_bytes
    monkeypatch.setattr(dry_run, "stage_bytes", lambda *given: replace(real(*given), embedding=0))
    result = checked("7b.yaml", "--gpus", "8", "--rank", "0")
    assert result.exit_code == 1
    assert [line.split(":")[0] for line in result.stdout.splitlines() if "differs" in line] == ["stage 0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--check", "--rank", "8", "--gpus", "8"], "--rank=8 is not a whole number from 0 to 7; nearest legal: 7"),
        (["--check", "--rank", "-1", "--gpus", "8"], "--rank=-1 is not a whole number from 0 to 7; did you mean 1?"),
        (["--check", "--rank", "abc", "--gpus", "8"], "--rank=abc is not a whole number from 0 to 7; write it as 7"),
        (
            ["--check", "--rank", "40", "parallel.tensor=1", "parallel.pipeline=2"],
            "--rank=40 is not a whole number from 0 to 1; nearest legal: 1",
        ),
        (["--rank", "abc"], "--rank=abc needs --check; add --check, or leave it out"),
        (["--rank", "0"], "--rank=0 needs --check; add --check, or leave it out"),
        (["--check", "--timeline"], "--timeline does not go with --check; leave one of them out"),
        (["--check", "--json"], "--check does not go with --json; leave one of them out"),
    ],
)
def test_refusals(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, [str(CONFIGS / "7b.yaml"), *arguments])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == sentence


def test_only_a_check_needs_torch() -> None:
    import subprocess

    program = "import sys, megallama.plan.cli, megallama.plan.report.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
