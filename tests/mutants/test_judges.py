"""A judge sees the mutant while it is there, and the tree as it was before and after, whatever was compiled."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.mutants.judges
from tests.launching import outliving
from tests.mutants.judges import Copy, ask
from tests.mutants.mutant import Mutant

MUTANT = Mutant("m", "a.py", "X = 0", "X = 1", "other", "a number")


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    (tmp_path / "megallama").mkdir()
    (tmp_path / "megallama" / "a.py").write_text("X = 0\n")
    return Copy(tmp_path)


def test_a_mutant_is_seen_while_it_is_there(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["-c", "import sys, megallama.a; print('seen'); sys.exit(megallama.a.X)"]
    monkeypatch.setattr(tests.mutants.judges, "commands", lambda judge, mutants: [command])
    assert ask("layers", copy, [MUTANT]) == ("missed", "")
    with copy.mutated(MUTANT):
        assert ask("layers", copy, [MUTANT]) == ("caught", "seen\n")
    assert ask("layers", copy, [MUTANT]) == ("missed", "")


def test_what_is_no_verdict_is_refused(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests.mutants.judges, "commands", lambda judge, mutants: [["-c", "raise SystemExit(4)"]])
    with pytest.raises(RuntimeError, match="layers ended with 4, which is no verdict"):
        ask("layers", copy, [MUTANT])


def test_a_command_that_hangs_is_ended_with_what_it_started(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import signal; signal.pause()'])"
    monkeypatch.setattr(tests.mutants.judges, "commands", lambda judge, mutants: [["-c", hang]])
    monkeypatch.setattr(tests.mutants.judges, "SECONDS", 1)
    assert ask("verify", copy, [MUTANT])[0] == "hangs"
    assert outliving(copy.root / "home of verify") == []
