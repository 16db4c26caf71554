"""The chat as a person types it, and the command under torchrun."""

from __future__ import annotations

import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megallama.cli import app
from megallama.errors import UserError
from megallama.generation.batch import Batch, Row
from megallama.generation.chat import answer, transcript, within
from megallama.generation.generate import generate
from megallama.generation.load import load_model
from megallama.generation.sampling import Sampling
from megallama.parallel.mesh import Axis
from tests.generation.tiny import WINDOW, loaded
from tests.launching import BIN, ROOT, clean_environment, execute

GREEDY = Sampling(temperature=0.0)


def test_the_oldest_messages_go_first_and_the_user_begins() -> None:
    model = loaded()
    said = [("user", "a"), ("assistant", "b"), ("user", "c")]
    whole = "User: a\nAssistant: b\nUser: c\nAssistant:"
    assert transcript(said) == whole
    assert within(model, said, len(whole)) == (said, list(whole.encode()))
    kept, ids = within(model, said, len(whole) - 1)
    assert (kept, bytes(ids).decode()) == (said[2:], "User: c\nAssistant:")
    with pytest.raises(UserError, match=f"this has 57 tokens, and the model's window has room for {WINDOW}; say less"):
        within(model, [("user", "x" * 40)], WINDOW)


def test_a_chat_answers_forgets_and_ends_with_its_input(short_run: Path, tmp_path: Path) -> None:
    words = [str(BIN / "megallama"), "chat", str(short_run), "--greedy", "--max-tokens", "6"]
    given = "hi\n/reset\nhi\n/nonsense\n" + "x" * 999 + "\n"
    outcome = subprocess.run(
        words, input=given, cwd=ROOT, env=clean_environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    head = "User: hi\nAssistant:"
    answer = generate(load_model(short_run), head, 6, GREEDY).removeprefix(head).partition("\nUser:")[0].strip()
    assert outcome.returncode == 0
    assert outcome.stdout == f"> {answer}\n> > {answer}\n> > > \n"
    assert "/nonsense is no command" in outcome.stderr
    assert "megallama: this has 1016 tokens" in outcome.stderr


def test_a_ctrl_c_keeps_what_has_been_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = loaded(), Batch.step
    whole = answer(model, [65], 12, GREEDY)
    steps = iter(range(5))

    def interrupted(batch: Batch) -> list[tuple[Row, str]]:
        if next(steps) == 4:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(Batch, "step", interrupted)
    part = answer(model, [65], 12, GREEDY)
    assert whole.startswith(part)
    assert 0 < len(part) < len(whole)


def test_ctrl_c_and_ctrl_d_at_a_terminal_end_no_more_than_they_should(short_run: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = [str(BIN / "megallama"), "chat", str(short_run), "--greedy", "--max-tokens", "30"]
    process = subprocess.Popen(
        words, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=clean_environment(tmp_path)
    )
    assert process.stdout is not None
    with open(ours, "wb", buffering=0) as keyboard:
        keyboard.write(b"hi\n")
        assert process.stdout.read(3).startswith(b"> ")  # its first character
        process.send_signal(signal.SIGINT)
        keyboard.write(b"\x04")
        assert process.wait(60) == 0


def test_two_ranks_under_torchrun_print_what_one_prints(short_run: Path, tmp_path: Path) -> None:
    words = ["-m", "megallama", "generate", str(short_run), "--prompt", "document 7 is", "--max-tokens", "12"]
    more = ["--samples", "2", "--seed", "5"]
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    outcome = execute([*torchrun, "--rdzv-endpoint", "localhost:0", *words, *more], tmp_path, OMP_NUM_THREADS="1")
    alone = execute([sys.executable, *words, *more], tmp_path)
    assert (outcome.code, outcome.out) == (0, alone.out)
    assert alone.out.count("document 7 is") == 2


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_commands_of_one_process_are_refused_to_several(
    command: str, short_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    outcome = CliRunner().invoke(app, [command, str(short_run), *(["--port", "0"] if command == "serve" else [])])
    assert str(outcome.exception) == "2 ranks were started, and this command is of one process; start it alone"


def test_ranks_that_do_not_divide_the_model_are_refused() -> None:
    with pytest.raises(UserError, match="3 ranks do not divide the model's num_attention_heads of 4; start 2"):
        loaded(tp=Axis(None, 0, 3))
