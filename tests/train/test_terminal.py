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
    environment = clean_environment(home, **NO_NETWORK, TERM="xterm", MY_API_KEY="a-secret-of-mine")
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


def test_a_terminal_gets_one_live_line_that_steps_overwrite(on_terminal: tuple[Path, str]) -> None:
    shown = on_terminal[1].replace("\r\n", "\n")
    assert re.search(r"^step 1/4  loss [^\n]*\rstep 2/4  loss [^\n]*\rstep 2  train loss ", shown, re.MULTILINE), shown
    assert re.search(r"^step 3/4  loss [^\n]*\rstep 4/4  loss ", shown, re.MULTILINE), shown
    assert shown.rstrip().splitlines()[-1] == "step 4  done"


def test_wandb_offline_needs_neither_network_nor_account(on_terminal: tuple[Path, str], straight: Path) -> None:
    home, _ = on_terminal
    (record,) = (home / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert record.stat().st_size > 1000
    assert losses(home / "run") == losses(straight / "run")


def test_no_secret_of_the_environment_is_written_down(on_terminal: tuple[Path, str]) -> None:
    files = [path for path in on_terminal[0].rglob("*") if path.is_file()]
    assert [path for path in files if b"a-secret-of-mine" in path.read_bytes()] == []


def read_all(descriptor: int) -> str:
    """Until no process has the other end open; a terminal says that with an error."""
    content = b""
    while True:
        try:
            content += os.read(descriptor, 65536)
        except OSError:
            return content.decode()
