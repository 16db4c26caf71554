"""What a person sees of a run: a live panel on a terminal, plain lines in a log.

Names of files are in the lines. They are made printable, and nothing here reads markup.
"""

from __future__ import annotations

import math
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from statistics import fmean

from megallama.errors import printable
from megallama.run_dir.events import Event, Sink

FREE_LINES = 20
"""Lines of steps that a log gets at once; after them it gets one in `_LINE_SECONDS`."""
_LINE_SECONDS = 1.0
_PANEL_SECONDS = 0.25
_PATIENCE_SECONDS = 2.0
_WIDEST, _TWO_COLUMNS, _LABEL = 79, 72, 11
_SPACE = 2
"""Empty rows above the panel, where the cursor rests: what others print there is not mixed with it."""
_TREND_STEPS, _TREND_BINS = 240, 12
_ERASE, _TO_LINE_END = "\r\x1b[J", "\x1b[K"


def open_terminal(save_every: int) -> Sink:
    """The panel where stdout is a terminal that moves its cursor, plain lines elsewhere."""
    if sys.stdout is None:  # closed by who started this
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    moves = os.environ.get("TERM", "dumb") not in ("", "dumb")
    return LivePanel(save_every) if moves and sys.stdout.isatty() else PlainLines()


class PlainLines:
    """A line for each event. After twenty steps at most one a second gets its line; the last of them always does."""

    def __init__(self) -> None:
        self._free, self._due = FREE_LINES, 0.0
        self._held: list[str] = []

    def write(self, event: Event) -> None:
        lines = lines_of(event)
        if event["event"] == "train":
            now = time.monotonic()
            if self._free == 0 and now < self._due:
                self._held = lines
                return
            self._free, self._due, self._held = max(0, self._free - 1), now + _LINE_SECONDS, []
        elif lines:
            self._release()
        if lines:
            _say("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        self._release()
        _finish()

    def leave(self) -> None:
        """Nothing to clear."""

    def _release(self) -> None:
        _say("".join(f"{line}\n" for line in self._held))
        self._held = []


class LivePanel:
    """A panel that each step brings up to date, at most four times a second, and other events as lines above it.

    The cursor rests above the panel: a new size of the window and what other processes print shift no row of it. At
    the end the last step is left as a plain line.
    """

    def __init__(self, save_every: int) -> None:
        self._save_every = save_every
        self._start: Event = {}
        self._train: Event = {}
        self._validation: Event = {}
        self._skipped = 0
        self._losses: deque[float] = deque(maxlen=_TREND_STEPS)
        self._drawn, self._due = False, 0.0
        self._patience = _PATIENCE_SECONDS

    def write(self, event: Event) -> None:
        self._note(event)
        lines = lines_of(event)
        if event["event"] == "train":
            if time.monotonic() >= self._due:
                self._show([])
        elif event["event"] == "stop":
            self._end(lines)
        elif lines:
            self._show(lines)

    def close(self) -> None:
        self._end([])
        _finish()

    def leave(self) -> None:
        """As `close`, from any thread of a process that ends at once: the main one may be in the middle of a line."""
        train, drawn = self._train, self._drawn
        if drawn and train:
            self._drawn = False
            self._say(_ERASE + "".join(f"{line}\n" for line in lines_of(train)))

    @cached_property
    def _terminal(self) -> int:
        """A descriptor of stdout's terminal that does not wait; that of stdout itself where it cannot be had."""
        stdout = sys.stdout.fileno()
        try:
            return os.open(os.ttyname(stdout), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:  # of another user
            return os.dup(stdout)

    def _say(self, text: str) -> None:
        """A terminal that takes nothing, stopped by Ctrl-S or read by nobody, is waited for once, and then left out."""
        left, until = text.encode(sys.stdout.encoding, "replace"), time.monotonic() + self._patience
        try:
            while left:
                _, ready, _ = select.select([], [self._terminal], [], max(0.0, until - time.monotonic()))
                if not ready:
                    break
                with suppress(BlockingIOError):
                    left = left[os.write(self._terminal, left) :]
        except OSError:  # it is gone
            return
        self._patience = 0.0 if left else _PATIENCE_SECONDS

    def _note(self, event: Event) -> None:
        kind = event["event"]
        if kind == "start":
            self._start = event
        elif kind == "train":
            self._train = event
            if math.isfinite(event["loss"]):
                self._losses.append(event["loss"])
        elif kind == "eval" and event["split"] == "validation":
            self._validation = event
        elif kind == "skip":
            self._skipped += 1

    def _show(self, above: Sequence[str]) -> None:
        text = (_ERASE if self._drawn else "") + "".join(f"{line}\n" for line in above)
        if self._train:
            columns, rows = _size()
            lines = self._lines(min(columns - 1, _WIDEST))[: max(1, rows - _SPACE - 1)]
            panel = [""] * _SPACE + lines
            text += "\r" + f"{_TO_LINE_END}\n".join(panel) + f"\x1b[J\x1b[{len(panel) - 1}A\r"
            self._drawn, self._due = True, time.monotonic() + _PANEL_SECONDS
        self._say(text)

    def _end(self, lines: Sequence[str]) -> None:
        last = lines_of(self._train) if self._train else []
        text = "".join(f"{line}\n" for line in [*last, *lines])
        drawn, self._drawn = self._drawn, False  # before what it shows: `leave` may come between
        self._train = {}
        self._say((_ERASE if drawn else "") + text)

    def _lines(self, width: int) -> list[str]:
        rich = _shows("━─▁█")
        step, total = self._train["step"], self._train["total_steps"]
        done = min(1.0, step / total)
        words = f"  step {step}/{total}  {done:.1%}"
        room = max(0, width - len(words))
        filled, rest = "━─" if rich else "#-"
        bar = filled * round(done * room) + rest * (room - round(done * room))
        return [line[:width].rstrip() for line in [bar + words, *_in_columns(self._cells(rich), width)]]

    def _cells(self, rich: bool) -> list[tuple[str, str]]:
        e = self._train
        validation = "none yet"
        if self._validation:
            validation = f"{self._validation['loss']:.4f} at step {self._validation['step']}"
        convention = f"{e['mfu']:.1%} full, {e['mfu_causal']:.1%} causal"
        # On a CPU what is measured is the process with its libraries, and what is planned its tensors.
        on_gpu = self._start.get("device") != "cpu"
        planned = self._start.get("predicted_memory_bytes") if on_gpu else None
        return [
            ("loss", f"{e['loss']:.4f} {_trend(self._losses, rich)}"),
            ("validation", validation),
            ("lr", f"{e['lr']:.2e}"),
            ("norm", f"{e['grad_norm']:.3f}" + (f", {self._skipped} skipped" if self._skipped else "")),
            ("speed", f"{e['tokens_per_second']:,.0f} tok/s"),
            ("MFU", f"{e['mfu']:.1%} full attention" if e["mfu"] == e["mfu_causal"] else convention),
            ("memory", size_words(e["peak_memory_bytes"]) + (f", plan {size_words(planned)}" if planned else "")),
            ("time left", _duration(e["seconds_left"])),
            ("next save", self._next_save()),
            ("restarts", f"{self._start.get('restarts', 0)}"),
        ]

    def _next_save(self) -> str:
        e = self._train
        step, total = e["step"], e["total_steps"]
        following = min(total, (step // self._save_every + 1) * self._save_every) if self._save_every else total
        return f"step {following}, in {_duration((following - step) * e['seconds'])}"


def _in_columns(cells: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Two cells a row where `width` has room for them."""
    texts = [f"{label:{_LABEL}}{value}" for label, value in cells]
    if width < _TWO_COLUMNS:
        return texts
    half = (width + 1) // 2
    return [f"{left[: half - 1]:{half}}{right}" for left, right in zip(texts[::2], texts[1::2], strict=True)]


def _trend(losses: Sequence[float], rich: bool) -> str:
    """By how much the loss has changed over what is kept of it, and a line of how."""
    count = min(_TREND_BINS, len(losses) // 2)
    if count < 2:
        return ""
    kept, size = list(losses), len(losses) / count
    means = [fmean(kept[round(size * i) : round(size * (i + 1))]) for i in range(count)]
    low, high = min(means), max(means)
    marks = "▁▂▃▄▅▆▇█"
    line = "".join(marks[round((mean - low) / (high - low) * 7)] for mean in means) if high > low else marks[0] * count
    return f"{means[-1] - means[0]:+.4f}" + (f" {line}" if rich else "")


def _size() -> tuple[int, int]:
    """Columns and rows now, of the terminal itself: COLUMNS would be those of its start."""
    try:
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        columns, rows = 0, 0
    return columns or 80, rows or 24


def _shows(characters: str) -> bool:
    try:
        characters.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return True


def _say(text: str) -> None:
    if not text:
        return
    with suppress(OSError):  # a log on a full disk, or nobody who reads any more: no reason to end the run
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            sys.stdout.write(text.encode("ascii", "backslashreplace").decode())
        sys.stdout.flush()


def _finish() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # Python would end with code 120 for what it cannot write when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def lines_of(event: Event) -> list[str]:
    """What the event is in a log, printable; nothing for one that has no line."""
    writer = _LINES.get(event["event"])
    said = writer(event) if writer else []
    return [printable(line) for line in ([said] if isinstance(said, str) else said)]


def size_words(count: float) -> str:
    """Bytes, as `1.50 GiB` or `2.1 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def _start_lines(e: Event) -> list[str]:
    steps, left = e["total_steps"], e["total_steps"] - e["step"]
    predicted = [f"{size_words(e['predicted_memory_bytes'])} on the fullest rank"]
    if "predicted_seconds" in e:
        predicted.append(f"{e['predicted_seconds']:.4g} s a step, {_duration(left * e['predicted_seconds'])} in all")
    else:
        predicted.append(f"no time: {e['device']} is not calibrated")
    restarts = f", restart {e['restarts']}" if e["restarts"] else ""
    ranks = "1 rank" if e["ranks"] == 1 else f"{e['ranks']} ranks"
    return [
        f"parameters  {e['parameters']:,}",
        f"layout      {e['layout']} on {ranks}, {e['device']}",
        f"steps       {steps:,}, of {e['tokens_per_step']:,} tokens",
        f"predicted   {', '.join(predicted)}",
        f"{'continues' if e['step'] else 'begins':12}at step {e['step']:,}{restarts}",
    ]


def _train_line(e: Event) -> str:
    total = e["total_steps"]
    return (
        f"step {e['step']:>{len(str(total))}}/{total}  loss {e['loss']:.4f}  norm {e['grad_norm']:.3f}  "
        f"lr {e['lr']:.2e}  {e['tokens_per_second']:,.0f} tok/s  mfu {e['mfu']:.1%}  "
        f"mem {e['peak_memory_bytes'] / 2**30:.2f} GiB  eta {_duration(e['seconds_left'])}"
    )


def _forecast_line(e: Event) -> str:
    said = []
    if "predicted_seconds" in e:
        predicted, measured = e["predicted_seconds"], e["seconds"]
        said.append(f"{measured:.4g} s a step, predicted {_beside(predicted, measured, '.4g', 's')}")
    if "predicted_memory_bytes" in e:
        predicted, measured = e["predicted_memory_bytes"] / 2**30, e["peak_memory_bytes"] / 2**30
        said.append(f"mem {measured:.2f} GiB, predicted {_beside(predicted, measured, '.2f', 'GiB')}")
    return f"step {e['step']}  {'  '.join(said)}"


def _beside(predicted: float, measured: float, digits: str, unit: str) -> str:
    return f"{predicted:{digits}} {unit} ({predicted / measured - 1:+.1%})"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


_SKIPPED = {
    "nonfinite": "gradient not finite",
    "loss": "loss far above the last ones",
    "gradient": "gradient norm far above the last ones",
}

_LINES: dict[str, Callable[[Event], str | list[str]]] = {
    "start": _start_lines,
    "train": _train_line,
    "eval": lambda e: f"step {e['step']}  {e['split']} loss {e['loss']:.4f}  perplexity {e['perplexity']:.2f}",
    "forecast": _forecast_line,
    "checkpoint": lambda e: (
        f"step {e['step']}  saved {e['path']} in {e['seconds']:.1f} s, {e['blocked_seconds']:.2f} s of them waited for"
    ),
    "checkpoint_failed": lambda e: f"step {e['step']}  could not be saved, going on: {e['reason']}",
    "profile": lambda e: (
        f"step {e['step']}  traced to {e['paths'][0]}"
        + (f" and {len(e['paths']) - 1} more" if len(e["paths"]) > 1 else "")
    ),
    "notice": lambda e: e["text"],
    "resume": lambda e: f"step {e['step']}  continues {e['path']}",
    "rollback": lambda e: f"step {e['step']}  went back to {e['path']}",
    "rewind": lambda e: (
        f"step {e['step']}  went back to {e['path']}; the samples from {e['passed_over'][0]} up to "
        f"{e['passed_over'][1]} of the data are passed over"
    ),
    "straggler": lambda e: (
        f"step {e['step']}  rank {e['rank']} on {e['host']} holds the others up: {e['seconds']:.3g} s a step, "
        f"{e['share']:.0%} of it"
    ),
    "skip": lambda e: f"step {e['step']}  {_SKIPPED[e['reason']]}: update skipped on every rank",
    "stop": lambda e: (
        f"step {e['step']}  {e['reason']}{'; the same command continues' if e['status'] == 'requeue' else ''}"
    ),
}
