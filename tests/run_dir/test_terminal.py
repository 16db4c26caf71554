"""The panel on a real pseudo-terminal, as a screen shows it, and the lines of a log."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import pytest

from megallama.run_dir.terminal import FREE_LINES, LivePanel, PlainLines, open_terminal
from tests.launching import ROOT
from tests.run_dir.screen import Screen

LABELS = ("loss", "validation", "lr", "norm", "speed", "MFU", "memory", "time left", "next save", "restarts")
START = {
    "event": "start",
    "step": 40,
    "ranks": 16,
    "parameters": 6738415616,
    "layout": "tp2-pp4-dp2-zero1-acc16",
    "tokens_per_step": 262144,
    "total_steps": 1000,
    "device": "NVIDIA H100 80GB HBM3",
    "predicted_memory_bytes": int(28.93 * 2**30),
    "predicted_seconds": 1.88,
    "restarts": 2,
}
STOP = {"event": "stop", "step": 60, "status": "requeue", "reason": "stopped by SIGTERM"}


def step(number: int, loss: float = 2.5) -> dict[str, Any]:
    return {
        "event": "train",
        "step": number,
        "total_steps": 1000,
        "loss": loss,
        "grad_norm": 0.25,
        "lr": 1.2e-4,
        "seconds": 1.88,
        "seconds_left": 1.88 * (1000 - number),
        "tokens_per_second": 140000.0,
        "mfu": 0.378,
        "mfu_causal": 0.364,
        "peak_memory_bytes": int(28.1 * 2**30),
    }


def validation(number: int) -> dict[str, Any]:
    return {"event": "eval", "step": number, "split": "validation", "loss": 2.25, "perplexity": 9.49}


class Window:
    """A pseudo-terminal that is stdout, and the screen that shows it."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.ours, theirs = pty.openpty()
        self.stdout = open(theirs, "w", encoding=encoding)  # noqa: SIM115
        self.screen = Screen(80, 24)

    def size(self, columns: int, rows: int, *, reflow: bool = True) -> None:
        fcntl.ioctl(self.stdout, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen = Screen(columns, rows, reflow=reflow)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.stdout, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(columns)

    def shown(self) -> list[str]:
        """The lines, with all that was written by now."""
        print("\x1b[0Z", end="", file=self.stdout, flush=True)  # what is read up to there was written before
        content = b""
        while not content.endswith(b"\x1b[0Z"):
            content += os.read(self.ours, 65536)
        self.screen.write(content.decode(self.stdout.encoding).removesuffix("\x1b[0Z"))
        return self.screen.lines


@pytest.fixture
def window() -> Iterator[Window]:
    made = Window()
    yield made
    os.close(made.ours)


def feed(window: Window, panel: LivePanel, *events: dict[str, Any]) -> list[str]:
    for event in events:
        panel._due = 0.0  # as if its time had come: what a step shows is asked for here, not how often
        with redirect_stdout(window.stdout):
            panel.write(event)
        window.shown()
    return window.shown()


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 50), (72, 24), (60, 24), (44, 24), (30, 14)])
def test_the_panel_shows_all_of_it_in_any_window(window: Window, columns: int, rows: int) -> None:
    window.size(columns, rows)
    losses = [3.0 - number / 100 for number in range(20)]
    panel = LivePanel(100)
    shown = feed(window, panel, START, validation(40), *(step(41 + n, loss) for n, loss in enumerate(losses)))
    panel_lines = shown[-6 if columns > 72 else -11 :]
    text = "\n".join(panel_lines)
    assert max(map(len, panel_lines)) < columns
    assert [label for label in LABELS if label not in text] == []
    assert "step 60/1000  6.0%" in panel_lines[0]
    expected = ["2.8100 -0.1", "2.2500 at step 40", "1.20e-04", "0.250", "140,000 tok/s", "37.8% full", "28.10 GiB",
                "0:29:27", "step 100, in 0", "2"]  # fmt: skip
    assert [value for value in expected if value not in text] == []
    if columns >= 44:
        for value in ("█▇▆▆▅▄▃▃▂▁", "37.8% full, 36.4% causal", "28.10 GiB, plan 28.93 GiB"):
            assert value in text, text
    assert text.count("loss") == 1


def test_the_page_shows_what_a_terminal_shows(window: Window) -> None:
    window.size(80, 24)
    losses = [3.0 - number / 100 for number in range(20)]
    steps = (step(41 + n, loss) for n, loss in enumerate(losses))
    shown = feed(window, LivePanel(100), START, validation(40), *steps)
    page = (ROOT / "docs" / "training.md").read_text()
    for part in (shown[:5], shown[-6:]):
        assert "```\n" + "\n".join(part) + "\n```\n" in page


@pytest.mark.parametrize("reflow", [True, False])
def test_a_new_size_of_the_window_leaves_one_panel_and_every_line(window: Window, reflow: bool) -> None:
    window.size(80, 24, reflow=reflow)
    panel = LivePanel(0)
    feed(window, panel, {"event": "notice", "text": "first"}, step(1), validation(1), step(2))
    for number, columns in enumerate((50, 120, 33, 80), 3):
        window.resize(columns, 24)
        shown = feed(window, panel, step(number))
        assert [line for line in shown if line.startswith("first")] == ["first"]
        assert [line for line in shown if "/1000" in line] == [line for line in shown if f"step {number}/1000" in line]
        assert sum("time left" in line for line in shown) == 1


def test_events_are_lines_above_and_the_end_is_plain(window: Window) -> None:
    window.size(120, 24)
    panel = LivePanel(0)
    saved = {"event": "checkpoint", "step": 2, "path": "runs/[bold]x[/]", "seconds": 1.0, "blocked_seconds": 0.0}
    skip = {"event": "skip", "step": 4, "reason": "nonfinite"}
    shown = feed(window, panel, START, step(1), step(2), saved, step(3), skip, step(4))
    assert shown[:7] == [
        "parameters  6,738,415,616",
        "layout      tp2-pp4-dp2-zero1-acc16 on 16 ranks, NVIDIA H100 80GB HBM3",
        "steps       1,000, of 262,144 tokens",
        "predicted   28.93 GiB on the fullest rank, 1.88 s a step, 0:30:05 in all",
        "continues   at step 40, restart 2",
        "step 2  saved runs/[bold]x[/] in 1.0 s, 0.00 s of them waited for",
        "step 4  gradient not finite: update skipped on every rank",
    ]
    assert max(map(len, shown[:5])) < 80
    assert "0.250, 1 skipped" in shown[-4]
    shown = feed(window, panel, STOP)
    with redirect_stdout(window.stdout):
        panel.close()
    assert window.shown() == shown
    assert shown[-3].startswith("step    4/1000  loss 2.5000")
    assert shown[-2:] == ["step 60  stopped by SIGTERM; the same command continues", ""]
    assert not any(label in line for line in shown for label in ("time left", "━"))


def test_the_first_step_is_shown_at_once_and_the_others_when_their_time_comes(window: Window) -> None:
    panel = LivePanel(0)
    with redirect_stdout(window.stdout):
        panel.write(validation(0))
        for number in range(1, 200):
            panel.write(step(number))
            panel._due += 3600.0
    shown = "\n".join(window.shown())
    assert "step 1/1000" in shown
    assert "step 199/1000" not in shown


@pytest.mark.parametrize("end", ["close", "leave"])
def test_a_run_that_fails_leaves_its_last_step(window: Window, end: str) -> None:
    panel = LivePanel(0)
    feed(window, panel, step(1), step(2))
    with redirect_stdout(window.stdout):
        getattr(panel, end)()
    shown = window.shown()
    assert shown[0].startswith("step    2/1000  loss 2.5000")
    assert not any("time left" in line for line in shown)
    assert shown[-1] == ""


def test_what_others_print_stays(window: Window) -> None:
    window.size(80, 24)
    panel = LivePanel(0)
    feed(window, panel, step(1))
    print("rank 3: said from elsewhere", file=window.stdout, flush=True)
    shown = feed(window, panel, step(2), step(3))
    assert shown[0] == "rank 3: said from elsewhere"
    assert sum("time left" in line for line in shown) == 1


def test_a_low_window_shows_what_it_has_room_for(window: Window) -> None:
    window.size(80, 5)
    panel = LivePanel(0)
    shown = feed(window, panel, step(1), step(2), validation(2), step(3))
    assert shown[0].startswith("step 2  validation")
    assert len(shown) == 5
    assert "step 3/1000" in shown[3]


def test_a_terminal_without_its_characters_gets_others() -> None:
    plain = Window("ascii")
    shown = feed(plain, LivePanel(0), *(step(number, 3.0 - number / 10) for number in range(1, 9)))
    assert shown[2].startswith("-----")
    os.close(plain.ours)


def test_a_terminal_that_is_closed_ends_nothing() -> None:
    closed, panel = Window(), LivePanel(0)
    feed(closed, panel, step(1))
    os.close(closed.ours)
    with redirect_stdout(closed.stdout):
        for event in (step(2), validation(2)):
            panel._due = 0.0
            panel.write(event)
        panel.leave()
        panel.write(STOP)
        panel.close()


def test_where_the_cursor_cannot_move_lines_are_plain(window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    with redirect_stdout(window.stdout):
        for term, kind in (("xterm", LivePanel), ("dumb", PlainLines)):
            monkeypatch.setenv("TERM", term)
            assert isinstance(open_terminal(0), kind)


def test_a_log_is_not_flooded_and_has_the_last_step_before_each_other_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines, began = PlainLines(), time.monotonic()
    for number in range(1, 1000):
        lines.write(step(number))
        if number == 500:
            lines.write(validation(number))
    lines.close()
    most = FREE_LINES + 2 + time.monotonic() - began
    shown = capsys.readouterr().out.splitlines()
    steps = [int(line.split()[1].partition("/")[0]) for line in shown if "/1000" in line]
    assert steps == sorted(set(steps))
    assert steps[:FREE_LINES] == list(range(1, FREE_LINES + 1))
    assert shown[shown.index("step 500  validation loss 2.2500  perplexity 9.49") - 1].startswith("step  500/1000")
    assert steps[-1] == 999
    assert len(steps) <= most


def test_a_terminal_that_nobody_reads_holds_no_step_for_long_and_no_end(window: Window) -> None:
    panel = LivePanel(0)
    began = time.monotonic()
    with redirect_stdout(window.stdout):
        for number in range(1, 200):
            panel._due = 0.0
            panel.write(step(number))
        panel.leave()
    assert time.monotonic() - began < 20
    os.read(window.ours, 65536)  # it was full


def test_a_log_that_lacks_a_character_gets_its_number() -> None:
    written = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(written, encoding="ascii", write_through=True)) as log:
        PlainLines().write({"event": "notice", "text": "runs/é"})
    assert written.getvalue() == b"runs/\\xe9\n"
    log.detach()


def test_a_start_without_stdout_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    terminal = open_terminal(10)
    terminal.write(step(1))
    terminal.close()
