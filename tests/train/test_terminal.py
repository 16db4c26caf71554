"""What a terminal and Weights & Biases get of a run."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import (
    NO_NETWORK,
    PRETRAIN,
    ROOT,
    arguments,
    clean_environment,
    kill_all,
    losses,
    outliving,
    pretrain,
)
from tests.run_dir.screen import Screen

SECRET = "0123456789abcdef" * 2 + "01234567"
"""Of the length that a key of Weights & Biases has."""


@pytest.fixture(scope="module")
def straight(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps in `run` and what it printed in `log`."""
    folder = tmp_path_factory.mktemp("straight")
    assert pretrain(1, arguments(byte_dataset, folder / "run"), log=folder / "log") == [(0, "")]
    return folder


@pytest.fixture(scope="module")
def on_terminal(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The home of a run on a terminal, with wandb offline and no network, and what the terminal got."""
    home = tmp_path_factory.mktemp("terminal")
    words = arguments(byte_dataset, home / "run", "logging.wandb={project: tests, mode: offline}")
    secrets = {"MY_API_KEY": "a-secret-of-mine", "WANDB_API_KEY": SECRET}
    environment = clean_environment(home, **NO_NETWORK, TERM="xterm", **secrets)
    ours, theirs = pty.openpty()
    with (home / "err.log").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, PRETRAIN, *words], cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=err
        )
    os.close(theirs)
    try:
        shown = read_all(ours)
        assert process.wait(120) == 0, (home / "err.log").read_text()
        assert outliving(home) == []
    finally:
        kill_all(home)
        process.wait()
        os.close(ours)
    return home, shown


def test_a_terminal_gets_a_panel_that_leaves_plain_lines_behind(on_terminal: tuple[Path, str]) -> None:
    shown = on_terminal[1]
    assert re.search(r"step 1/4  25.0%.*\r\nloss +\d.*validation +\d.*\r\n", shown), shown
    screen = Screen(80, 24)  # what a terminal has that does not know its size
    screen.write(shown)
    begun = ["parameters", "layout", "steps", "predicted", "begins"]
    assert [line.split()[0] for line in screen.lines[:5]] == begun
    text = "\n".join(screen.lines)
    assert re.search(r"^step 4/4  loss .*(\n.*)?\nstep 4  done\n?$", text, re.MULTILINE), text
    assert [text.count(word) for word in ("/4  ", "time left")] == [1, 0], text


def test_a_terminal_that_is_closed_ends_no_run(byte_dataset: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, PRETRAIN, *arguments(byte_dataset, tmp_path / "run")]
    with (tmp_path / "err.log").open("w") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(tmp_path, TERM="xterm"), stdin=theirs, stdout=theirs, stderr=err
        )
    os.close(theirs)
    try:
        assert os.read(ours, 1)
        os.close(ours)
        assert process.wait(120) == 0, (tmp_path / "err.log").read_text()
    finally:
        kill_all(tmp_path)
        process.wait()
    assert len(losses(tmp_path / "run")) == 4


def test_wandb_offline_needs_neither_network_nor_account(on_terminal: tuple[Path, str], straight: Path) -> None:
    home, _ = on_terminal
    (record,) = (home / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert record.stat().st_size > 1000
    assert losses(home / "run") == losses(straight / "run")


def test_no_secret_of_the_environment_is_written_down(on_terminal: tuple[Path, str]) -> None:
    files = [path for path in on_terminal[0].rglob("*") if path.is_file()]
    assert files
    for secret in (b"a-secret-of-mine", SECRET.encode()):
        assert [path for path in files if secret in path.read_bytes()] == []


def read_all(descriptor: int) -> str:
    """Until no process has the other end open; a terminal says that with an error."""
    content = b""
    while True:
        try:
            content += os.read(descriptor, 65536)
        except OSError:
            return content.decode()
