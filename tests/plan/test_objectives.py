"""A masked run in the plan: attention over the whole square of positions, everything else as for a causal one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from megallama.config.load import load_config
from megallama.layout.stages import layers_per_stage
from megallama.plan.cli import plan

CONFIGS = Path(__file__).parents[2] / "configs"
app = typer.Typer()
app.command()(plan)


def planned(*words: str) -> dict[str, dict[str, Any]]:
    """A plan of the 7B at a sequence length at which attention weighs something."""
    long = ["data.sequence_length=16384", "model.max_position_embeddings=16384", "train.recompute=full"]
    result = CliRunner().invoke(
        app, [str(CONFIGS / "7b.yaml"), "--gpus", "128", "--gpu", "h100", "--json", *long, *words]
    )
    assert result.exit_code == 0, (result.stdout, result.exception)
    found: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return found


def test_attention_takes_twice_the_time_and_nothing_else_changes() -> None:
    causal, masked = planned(), planned("train.objective=masked")
    assert masked["step_time"]["attention"] == pytest.approx(2 * causal["step_time"]["attention"])
    for row in ("matmul", "memory", "tensor", "pipeline", "data", "optimizer"):
        assert masked["step_time"][row] == causal["step_time"][row], row
    assert masked["memory"] == causal["memory"]
    for rows in ("flops", "speed"):
        assert set(causal[rows]) - set(masked[rows]) == {name for name in causal[rows] if name.endswith("causal")} != {}
    for row in ("per_token_full", "per_token_hardware", "run_full"):
        assert masked["flops"][row] == causal["flops"][row]


def test_layers_weigh_more_beside_the_head() -> None:
    """A head of 128,256 tokens costs 1.08 layers of a causal 8B at this length, and 0.70 of a masked one."""

    def split(objective: str) -> tuple[int, ...]:
        words = ["parallel.pipeline=4", "data.sequence_length=65536", "model.max_position_embeddings=65536"]
        return layers_per_stage(load_config(CONFIGS / "8b.yaml", [*words, f"train.objective={objective}"]))

    assert split("causal") == (8, 9, 8, 7)
    assert split("masked") == (8, 8, 8, 8)


def test_the_ledger_is_what_a_rank_of_a_masked_run_really_does() -> None:
    words = [str(CONFIGS / "7b.yaml"), "--gpus", "128", "--check", "train.objective=masked"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (result.stdout, result.exception)
    assert "bytes kept for backward" in result.stdout and "differs" not in result.stdout
