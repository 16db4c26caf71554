"""A Ctrl-C, which a terminal sends to every process of a command: one sentence, and nobody left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.runs import wait_for
from tests.launching import BIN, ROOT, clean_environment, execute, kill_all, outliving, processes_of

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
        pattern = "corpus.parts-*/*.npz" if moment == "its workers work" else "corpus.parts-*"
        wait_for(lambda: any(tmp_path.glob(pattern)) and len(processes_of(tmp_path)) >= 3)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert outliving(tmp_path) == []
    finally:
        kill_all(tmp_path)
        process.wait()
    assert (tmp_path / "err").read_text() == "megallama: ended by Ctrl-C; the same command starts again\n"
    assert not (tmp_path / "corpus.idx").exists()
    ended = execute(command, tmp_path)
    assert (ended.code, ended.left_over) == (0, []), ended.err
    assert f"{LINES:,} documents" in ended.out


def test_other_commands_end_in_one_sentence(tmp_path: Path) -> None:
    """Here one that reads its configuration, which never comes to an end."""
    os.mkfifo(tmp_path / "run.yaml")
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [str(BIN / "megallama"), "config", str(tmp_path / "run.yaml")],
            cwd=ROOT,
            env=clean_environment(tmp_path),
            stderr=err,
            start_new_session=True,
        )
    with (tmp_path / "run.yaml").open("w"):  # it has opened it too
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
    assert (tmp_path / "err").read_text() == "megallama: ended by Ctrl-C; the same command starts again\n"
