"""A Ctrl-C, which a terminal sends to every process of a command: one sentence, and nobody left."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.runs import wait_for
from tests.launching import BIN, ROOT, clean_environment, execute, kill_all, outliving, processes_of, without_progress

LINES = 60_000


@pytest.mark.parametrize("moment", ["its workers begin", "its workers work"])
def test_a_build_ends_in_one_sentence_and_goes_on_later(moment: str, tmp_path: Path) -> None:
    line = json.dumps({"text": "something that is said again and again " * 10})
    (tmp_path / "text.jsonl").write_text("\n".join([line] * LINES))
    words = ["data", "build", str(tmp_path / "text.jsonl"), "--output", str(tmp_path / "corpus"), "--workers", "2"]
    command = [str(BIN / "megallama"), *words]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(tmp_path), stderr=err, start_new_session=True
        )
    try:
        pattern = "corpus.parts/*.shard" if moment == "its workers work" else "corpus.parts"
        wait_for(lambda: any(tmp_path.glob(pattern)) and len(processes_of(tmp_path)) >= 3)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert outliving(tmp_path) == []
    finally:
        kill_all(tmp_path)
        process.wait()
    said = without_progress((tmp_path / "err").read_text())
    assert said == ["megallama: ended by Ctrl-C; the same command starts again"]
    assert not (tmp_path / "corpus.idx").exists()
    ended = execute(command, tmp_path)
    assert (ended.code, ended.left_over) == (0, []), ended.err
    assert f"{LINES:,} documents" in ended.out


def test_a_build_that_is_told_to_end_does_so_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("\n".join([json.dumps({"text": "said again " * 30})] * LINES))
    words = ["data", "build", str(tmp_path / "text.jsonl"), "--output", str(tmp_path / "corpus"), "--workers", "2"]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen([str(BIN / "megallama"), *words], env=clean_environment(tmp_path), stderr=err)
    try:
        wait_for(lambda: len(processes_of(tmp_path)) >= 4)  # with that which multiprocessing tracks resources by
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
        assert outliving(tmp_path, 30.0) == []
    finally:
        kill_all(tmp_path)
        process.wait()
    assert without_progress((tmp_path / "err").read_text()) == []


def test_other_commands_end_in_one_sentence(tmp_path: Path) -> None:
    """Here one whose output nobody takes, which begins to write it and waits."""
    taken, given = os.pipe()
    fcntl.fcntl(given, fcntl.F_SETPIPE_SZ, 4096)
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [str(BIN / "megallama"), "config", "--schema"],
            cwd=ROOT,
            env=clean_environment(tmp_path),
            stdout=given,
            stderr=err,
            start_new_session=True,
        )
    os.close(given)
    with os.fdopen(taken, "rb") as output:
        output.read(1)
        os.killpg(process.pid, signal.SIGINT)
        output.read()
    assert process.wait(30) == 130
    assert (tmp_path / "err").read_text() == "megallama: ended by Ctrl-C; the same command starts again\n"
