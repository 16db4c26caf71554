"""`megallama checkpoint ...` says what it found, in its exit code too, and waits for no torch."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megallama.checkpoint.commands import progress
from megallama.checkpoint.commands.cli import checkpoint_app
from megallama.checkpoint.format import BEST, LATEST, STATE, read_document, read_manifest
from megallama.errors import UserError
from tests.checkpoint.damaging import CHECKPOINT, copy_as, edit, edit_manifest, flip
from tests.checkpoint.test_inspect import EMBEDDING, put


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a whole checkpoint, an unfinished one, `latest` and `best`."""
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(CHECKPOINT, folder / "step_00000003")
    (folder / "step_00000004.partial-0123abcd").mkdir()
    (folder / "step_00000004.partial-0123abcd" / "rank_00000.bin").write_bytes(bytes(1500))
    (folder / LATEST).write_text("step_00000003")
    (folder / BEST).write_text("step_00000002")
    return tmp_path / "run"


def call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(checkpoint_app, [str(word) for word in words], catch_exceptions=False)
    return done.exit_code, done.stdout


def call_json(*words: object) -> tuple[int, Any]:
    code, out = call(*words, "--json")

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return code, json.loads(out, parse_constant=refuse)


def test_list_is_a_table_with_the_newest_first(run: Path) -> None:
    code, out = call("list", run)
    head, first, second = (line for line in out.splitlines() if line.startswith(("│", "┃")))
    assert code == 0
    assert head.replace("┃", "").split() == ["step", "saved", "size", "loss", "validation", "layout"]
    assert first.replace("│", "").split() == ["4", "-", "1.5", "kB", "-", "-", "-", "unfinished"]
    said = second.replace("│", "").split()
    assert said[0] == "3"
    assert said[3:] == ["92.9", "kB", "5.3963", "5.3731", "tp2-dp2-zero1,", "fp32", "complete,", "latest"]
    assert "best names 'step_00000002', which is not there" in out
    assert call("list", run / "checkpoints") == (code, out)


def test_list_as_json_has_what_the_table_has_at_full_precision(run: Path) -> None:
    edit(run / "checkpoints" / "step_00000003" / STATE, lambda content: content.update(loss=float("nan")))
    code, found = call_json("list", run)
    assert (code, found["latest"], found["best"]) == (0, "step_00000003", "step_00000002")
    unfinished, whole = found["checkpoints"]
    assert whole["validation_loss"] == read_document(CHECKPOINT)["state"]["validation_loss"]
    assert whole["loss"] is None
    assert whole["saved"] == read_manifest(CHECKPOINT).saved
    assert (whole["step"], whole["condition"], whole["marks"]) == (3, "complete", ["latest"])
    assert (unfinished["step"], unfinished["condition"], unfinished["bytes"]) == (4, "unfinished", 1500)


def test_verify_says_a_line_for_each_checkpoint_and_fails_if_one_is_damaged(run: Path) -> None:
    sound = run / "checkpoints" / "step_00000003"
    assert call("verify", run) == call("verify", sound) == (0, f"{sound}: sound\n")
    damaged = copy_as(sound, 5)
    flip(damaged / "rank_00001.bin")
    flip(damaged / STATE)
    reasons = ["rank_00001.bin is damaged", "state.json is damaged"]
    code, out = call("verify", run)
    assert (code, out) == (2, f"{damaged}: damaged: {'; '.join(reasons)}\n{sound}: sound\n")
    assert call("verify", sound, damaged)[0] == 2
    assert call_json("verify", run) == (
        2,
        {
            "passed": False,
            "checkpoints": [
                {"path": str(damaged), "sound": False, "reasons": reasons},
                {"path": str(sound), "sound": True, "reasons": []},
            ],
        },
    )


def test_show_says_what_a_checkpoint_holds(run: Path) -> None:
    path = run / "checkpoints" / "step_00000003"
    code, out = call("show", path)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    for line in ("format 1", "samples 12", "hidden_size 8", "head_dim null", "zero_stage 1", "seed 1"):
        assert line in lines
    assert f"{EMBEDDING} [257, 8]" in lines
    assert f"rank_00001.bin 5.3 kB, sha256 {read_manifest(path).files['rank_00001.bin'].sha256}" in lines
    code, facts = call_json("show", path)
    assert (code, facts["format"], facts["saved"]) == (0, 1, read_manifest(path).saved)
    assert {key: facts[key] for key in ("state", "loss", "data", "model", "layout")} == read_document(path)
    assert facts["versions"].keys() == {"megallama", "torch", "deepspeed"}
    assert facts["files"]["rank_00001.bin"]["bytes"] == 5280
    assert facts["tensors"][f"optimizer.exp_avg_sq.{EMBEDDING}"] == [257, 8]


def test_diff_ends_with_0_for_equal_and_1_for_different_checkpoints(run: Path) -> None:
    a = run / "checkpoints" / "step_00000003"
    b = shutil.copytree(a, a.with_name("step_00000005"))
    code, out = call("diff", a, b)
    assert (code, out.splitlines()[-1]) == (0, "90 of 90 tensors are equal to the bit")
    assert out.count("equal to the bit") == 91
    put(float("nan"))(b)
    assert call("diff", a, b)[0] == 1
    edit(b / STATE, lambda content: content["layout"].update(data=4))
    code, out = call("diff", a, b)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert (code, lines[-1]) == (1, "89 of 90 tensors are equal to the bit")
    assert "layout.data: 2 in A, 4 in B" in lines
    assert f"{EMBEDDING} largest nan relative nan" in lines
    code, found = call_json("diff", a, b)
    assert (code, found["equal"]) == (1, False)
    assert found["fields"] == [{"key": "layout.data", "a": 2, "b": 4}]
    assert {t["name"]: t["largest"] for t in found["tensors"] if not t["equal"]} == {EMBEDDING: None}


def test_another_state_alone_makes_checkpoints_differ(run: Path) -> None:
    a = run / "checkpoints" / "step_00000003"
    b = shutil.copytree(a, a.with_name("step_00000005"))
    edit(b / STATE, lambda content: content["state"].update(samples=16))
    assert call("diff", a, b)[0] == 1


def test_what_is_no_checkpoint_is_refused_with_one_that_is(run: Path, tmp_path: Path) -> None:
    whole = run / "checkpoints" / "step_00000003"
    torn = run / "checkpoints" / "step_00000004.partial-0123abcd"
    newer = shutil.copytree(whole, tmp_path / "newer")
    edit_manifest(newer, lambda tree: tree.update(format=2))
    cases: list[tuple[tuple[object, ...], str]] = [
        (("list", tmp_path / "nowhere"), "nowhere is not a folder; give a run directory such as runs/quickstart"),
        (("verify", tmp_path), "holds no checkpoint; give a run directory such as runs/quickstart"),
        (("show", run), f"{run} is not a checkpoint; give {whole}"),
        (("show", tmp_path), f"{tmp_path} is not a checkpoint; give a folder such as runs/"),
        (("show", torn), f"{torn} is not a whole checkpoint (it has no manifest.json); give another"),
        (("diff", whole, run), f"{run} is not a checkpoint; give {whole}"),
        (("diff", whole, torn), "is not a whole checkpoint"),
        *(((command, newer), "this megallama reads up to 1; use a newer megallama") for command in ("show", "verify")),
    ]
    for words, sentence in cases:
        with pytest.raises(UserError) as refused:
            call(*words)
        assert sentence in str(refused.value), words


@pytest.mark.parametrize("command", ["list", "verify", "show", "diff", "rollback"])
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: megallama checkpoint {command}" in " ".join(call(command, "--help")[1].split())


def test_no_command_imports_torch(run: Path) -> None:
    """A user who looks at a checkpoint waits for what he asked for."""
    path = run / "checkpoints" / "step_00000003"
    program = "import sys; sys.modules['torch'] = None; from megallama.cli import main; main()"
    for words in (["list", run], ["verify", run], ["show", path], ["diff", path, path], ["rollback", run, 3]):
        command = [sys.executable, "-c", program, "checkpoint", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "200"})
        assert (done.returncode, done.stderr) == (0, ""), words


def test_what_is_read_is_shown_on_a_terminal_and_not_before_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(silent: float, *, terminal: bool) -> str:
        screen = io.StringIO()
        monkeypatch.setattr(progress, "SILENT_SECONDS", silent)
        monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=terminal))
        with progress.shown() as report:
            report("rank_00007.bin")
            time.sleep(0.3)
        return screen.getvalue()

    assert "rank_00007.bin" in seen(0.05, terminal=True)
    assert seen(60.0, terminal=True) == ""
    assert seen(0.05, terminal=False) == ""
