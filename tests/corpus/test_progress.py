"""A build shows how far it is: a line that moves on a terminal, lines elsewhere, nothing while it is short."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from megallama.corpus.building import progress
from megallama.corpus.building.progress import Progress
from megallama.corpus.building.shard import Counts


def shown(monkeypatch: pytest.MonkeyPatch, seconds: float, *, terminal: bool) -> str:
    """By a build of that many seconds, 1,000 of 4,000 bytes of files in; 600 of them stood before."""
    clock = iter([0.0, 0.0, seconds, seconds])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock, seconds))
    screen = io.StringIO()
    with monkeypatch.context():
        told = Progress(Console(file=screen, force_terminal=terminal, width=100), 4000)
        told.add(Counts(5, 50, 10_000_000))
        told.read(600)
        with told:
            told.add(Counts(7, 70, 30_000_000))
            told.read(400)
            told.show()
    return screen.getvalue()


SENTENCE = "12 documents, 120 tokens, 2.5 MB/s of text, 1:30 left"


@pytest.mark.parametrize("terminal", [True, False])
def test_documents_speed_and_time_left_are_shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    said = shown(monkeypatch, 12.0, terminal=terminal)
    assert SENTENCE in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said)
    assert said.endswith("\n") is not terminal


@pytest.mark.parametrize(("seconds", "terminal"), [(1.0, True), (1.0, False), (9.0, False)])
def test_a_short_build_says_nothing(monkeypatch: pytest.MonkeyPatch, seconds: float, terminal: bool) -> None:
    assert "documents" not in shown(monkeypatch, seconds, terminal=terminal)
