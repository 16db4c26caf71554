"""The commands do what their help shows, twice in a row, and print JSON where asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megallama.corpus.cli import data_app, tokenizer_app
from megallama.errors import UserError


def call(app: typer.Typer, *arguments: str) -> str:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False).stdout


def test_train_build_and_info_work_together_and_twice(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i} of the text, which is long\n" for i in range(500)))
    source, folder, prefix = str(tmp_path / "a.txt"), str(tmp_path / "tok"), str(tmp_path / "d")
    train = ("train", source, "--output", folder, "--vocab-size", "280")
    build = ("build", source, "--output", prefix, "--tokenizer", folder, "--workers", "1")
    assert "280 entries, trained" in call(tokenizer_app, *train)
    assert "280 entries, kept" in call(tokenizer_app, *train)
    assert "1 documents" in call(data_app, *build)
    assert "kept" in call(data_app, *build)
    assert "built" in call(data_app, *build, "--force")
    tokenizer = json.loads(call(tokenizer_app, "info", folder, "--json"))
    dataset = json.loads(call(data_app, "info", prefix, "--json"))
    assert (tokenizer["vocab_size"], tokenizer["eod_id"]) == (280, 279)
    assert (dataset["vocab_size"], dataset["documents"], dataset["dtype"]) == (280, 1, "uint16")
    assert dataset["fingerprint"] == tokenizer["fingerprint"]
    assert "documents    1" in call(data_app, "info", prefix)


def test_errors_of_the_user_reach_the_top_level(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        call(data_app, "info", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="does not exist"):
        call(data_app, "build", str(tmp_path / "missing"), "--output", str(tmp_path / "d"))


@pytest.mark.parametrize("command", ["build", "info"])
def test_help_of_data_commands_shows_an_example(command: str) -> None:
    assert f"Example: megallama data {command}" in call(data_app, command, "--help")


@pytest.mark.parametrize("command", ["train", "info"])
def test_help_of_tokenizer_commands_shows_an_example(command: str) -> None:
    assert f"Example: megallama tokenizer {command}" in call(tokenizer_app, command, "--help")
