"""Weights & Biases: one run however often it is started, no row lost, and nothing that fails there ends a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from wandb.proto import wandb_internal_pb2

from tests.launching import PRETRAIN, ROOT, arguments, clean_environment, events, kill_all, pretrain

OFFLINE = "logging.wandb={project: tests, mode: offline}"
KEY = "0123456789abcdef" * 2 + "01234567"
ONE_EVENT = """
import sys
from pathlib import Path
from megallama.config.load import load_config
from megallama.run_dir.metrics import open_metrics

config = load_config("configs/debug.yaml", ["logging.wandb={project: tests}"])
with open_metrics(config, Path(sys.argv[1])) as metrics:
    metrics.write("eval", step=1, split="train", loss=1.0, perplexity=2.0)
"""


def test_all_starts_of_a_run_are_one_run_whose_repeated_steps_are_kept(byte_dataset: str, tmp_path: Path) -> None:
    """Until one begins anew."""
    run_dir = tmp_path / "run"
    mixture = ["data.path=null", f"data.mixture=[{{path: {byte_dataset}, weight: 1, name: web}}]"]
    words = arguments(byte_dataset, run_dir, OFFLINE, "checkpoint.every=1", "checkpoint.keep=9", "evaluation.every=0")
    words += mixture
    assert pretrain(1, [*words, "train.stop_after=3"])[0][0] == 0
    shutil.rmtree(run_dir / "checkpoints" / "step_00000003")  # back to the second step
    assert pretrain(1, words)[0][0] == 0
    known = (run_dir / "wandb_id").read_text()
    assert pretrain(1, [*words, "train.stop_after=1", "checkpoint.resume=never"])[0][0] == 0
    before, after, anew = recorded(run_dir)
    assert before.keys() == after.keys() == {known}
    assert anew.keys() == {(run_dir / "wandb_id").read_text()} != {known}
    (first,), (second,) = before.values(), after.values()
    assert [row["step"] for row in first if "train/loss" in row] == [1, 2, 3]
    assert [row["step"] for row in second if "train/loss" in row] == [3, 4]
    assert [row["train/source_tokens/web"] for row in second if "train/loss" in row] == [3 * 128, 4 * 128]
    counted = [row["_step"] for row in [*first, *second]]
    assert counted == sorted(set(counted)), "it drops what goes back"


def test_a_process_of_wandb_that_is_killed_ends_no_run(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", OFFLINE, "evaluation.every=0")
    ((code, said),) = pretrain(1, words, plant=kill_wandb)
    assert code == 0
    assert said.count("megallama: Weights & Biases is not reached (") == 1
    assert "; the run goes on without\n" in said
    assert [event["step"] for event in events(tmp_path / "run", "train")] == [1, 2, 3, 4]


def kill_wandb() -> None:
    """In the second step."""
    import megallama.train.loop

    train: Any = megallama.train.loop
    original, calls = train.train_step, []

    def watched(*words: Any) -> Any:
        calls.append(words)
        if len(calls) == 2:
            while not (served := [c for c in psutil.Process().children() if "wandb-core" in name_of(c)]):
                time.sleep(0.01)  # a thread starts it
            for child in served:
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
        return original(*words)

    train.train_step = watched


def name_of(process: psutil.Process) -> str:
    """Empty where it has ended since it was found."""
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


class Refusing(BaseHTTPRequestHandler):
    """Weights & Biases on a bad day."""

    def do_POST(self) -> None:
        self.send_response(400)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    """The address of a server that refuses everything."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes every request and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("server", ["refusing", "silent"])
def test_a_run_that_is_not_reached_online_is_written_offline(
    server: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """It ends while the server still holds its requests, and no file has the key."""
    place = {"WANDB_BASE_URL": request.getfixturevalue(server), "WANDB_INIT_TIMEOUT": "5", "WANDB_API_KEY": KEY}
    command = [sys.executable, "-c", ONE_EVENT, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(tmp_path, **place), capture_output=True, text=True, check=True
    )
    assert done.stderr.count("megallama: Weights & Biases is not reached (") == 1
    assert "; what it would get is written offline, for `wandb sync`\n" in done.stderr
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [row["eval/train/loss"] for row in rows(file)[1]] == [1.0]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_server_that_never_answers_holds_no_step(silent: str, byte_dataset: str, tmp_path: Path) -> None:
    """All steps are done before the start of the tracker, which takes 90 s, has given up."""
    words = arguments(byte_dataset, tmp_path / "run", "logging.wandb={project: tests}")
    place = {"WANDB_BASE_URL": silent, "WANDB_API_KEY": KEY}
    log, outcome = tmp_path / "log", tmp_path / "run" / "outcome.json"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, PRETRAIN, *words],
            cwd=ROOT,
            env=clean_environment(tmp_path, **place),
            stdout=sink,
            stderr=sink,
        )
    try:
        # The terminal says that the run is done a moment before its outcome does.
        while "step 4  done" not in log.read_text() or json.loads(outcome.read_text())["status"] == "running":
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        assert [event["step"] for event in events(tmp_path / "run", "train")] == [1, 2, 3, 4]
        assert json.loads(outcome.read_text())["status"] == "done"
        assert "is not reached" not in log.read_text()
    finally:
        kill_all(tmp_path)
        process.wait()


def recorded(run_dir: Path) -> list[dict[str, list[dict[str, float]]]]:
    """For each start, in their order, the rows that it wrote by the id of the run."""
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    return [dict([rows(file)]) for file in files]


def rows(file: Path) -> tuple[str, list[dict[str, float]]]:
    """Id and numbers of a run, as wandb has written them."""
    run, found = "", []
    for content in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run.run_id
        elif kind == "history":
            items = record.history.item
            found.append({"/".join(item.nested_key) or item.key: float(item.value_json) for item in items})
    return run, found


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, behind a header of seven bytes."""
    block, header, whole, last = 1 << 15, 7, 1, 4
    place, record = header, b""
    while place + header <= len(content):
        if block - place % block < header:
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + header])
        record += content[place + header : place + header + length]
        place += header + length
        if kind in (whole, last):
            yield record
            record = b""
