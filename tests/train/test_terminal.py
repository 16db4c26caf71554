"""What a terminal and Weights & Biases get of a run."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
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
    process, ours = begin_on_terminal(home, words, PRETRAIN, err=home / "err.log", **NO_NETWORK, **secrets)
    try:
        shown = read_all(ours).decode()
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
    process, ours = begin_on_terminal(
        tmp_path, arguments(byte_dataset, tmp_path / "run"), PRETRAIN, err=tmp_path / "err.log"
    )
    try:
        assert os.read(ours, 1)
        os.close(ours)
        assert process.wait(120) == 0, (tmp_path / "err.log").read_text()
    finally:
        kill_all(tmp_path)
        process.wait()
    assert len(losses(tmp_path / "run")) == 4


STUCK = """
import os, runpy, sys, threading
import megallama.train.loop as loop

step, done = loop.train_step, []
def train_step(*words):
    done.append(words)
    if len(done) > 3:
        os.write(1, b"it hangs\\n")
        threading.Event().wait()
    return step(*words)
loop.train_step = train_step
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("stuck", [False, True], ids=["saved", "stuck"])
def test_a_ctrl_c_leaves_the_terminal_in_order(stuck: bool, byte_dataset: str, tmp_path: Path) -> None:
    """Also the second one, which ends a run at once that stands in a step."""
    words = arguments(byte_dataset, tmp_path / "run", "train.steps=1000000", "evaluation.every=0")
    program = ("-c", STUCK, PRETRAIN) if stuck else (PRETRAIN,)
    process, ours = begin_on_terminal(tmp_path, words, *program, err=None)
    try:
        shown = b""
        while b"time left" not in shown or (stuck and b"it hangs" not in shown):
            shown += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        while stuck and process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        screen = Screen(80, 24)
        screen.write((shown + read_all(ours)).decode())  # a character may have come in two parts
        assert process.wait(120) == (130 if stuck else 75)
    finally:
        kill_all(tmp_path)
        process.wait()
        os.close(ours)
    text = "\n".join(screen.lines)
    assert "time left" not in text
    assert ("ended by a second Ctrl-C" if stuck else "stopped by a signal; the same command continues") in text
    assert len(re.findall("^step +\\d+/1000000  loss", text, re.MULTILINE)) == 1, text


def begin_on_terminal(
    home: Path, words: list[str], *program: str, err: Path | None, **variables: str
) -> tuple[subprocess.Popen[bytes], int]:
    """A run whose stdout, and stderr without `err`, is a terminal, and the other end of it."""
    ours, theirs = pty.openpty()
    environment = clean_environment(home, TERM="xterm", **variables)
    with (err or Path(os.devnull)).open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, *program, *words],
            cwd=ROOT,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs if err is None else sink,
        )
    os.close(theirs)
    return process, ours


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


def read_all(descriptor: int) -> bytes:
    """Until no process has the other end open; a terminal says that with an error."""
    content = b""
    while True:
        try:
            content += os.read(descriptor, 65536)
        except OSError:
            return content
