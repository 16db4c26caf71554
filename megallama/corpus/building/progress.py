"""How far a build is: on a terminal a line that moves, elsewhere a line now and then, nothing for a short build."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from megallama.corpus.building.shard import Counts

SILENT_SECONDS = 2.0
LINE_SECONDS = 10.0


class Progress:
    """Documents and text of a build so far, and the time left by the bytes of its files, `total` of them."""

    def __init__(self, console: Console, total: int) -> None:
        self.documents, self.tokens, self._text_bytes = 0, 0, 0
        self._total, self._read, self._console = total, 0, console
        self._begin()
        self._bar = Bar(
            TextColumn("tokenising"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=max(total, 1))

    def __enter__(self) -> Progress:
        """From now on time counts. What was added before stood already."""
        self._begin()
        return self

    def _begin(self) -> None:
        self._began = self._told = time.monotonic()
        self._text_bytes_before, self._read_before = self._text_bytes, self._read

    def add(self, counts: Counts) -> None:
        """Another block stands."""
        self.documents += counts.documents
        self.tokens += counts.tokens
        self._text_bytes += counts.text_bytes

    def read(self, file_bytes: int) -> None:
        """So many more bytes of the files are done with."""
        self._read += file_bytes

    def show(self) -> None:
        """Tell it, if it is time to."""
        now = time.monotonic()
        if now - self._began < SILENT_SECONDS:
            return
        if self._console.is_terminal:
            self._bar.start()
            self._bar.update(self._task, completed=self._read, description=self._sentence(now))
        elif now - self._told >= LINE_SECONDS:
            self._told = now
            self._console.print(f"tokenising: {self._sentence(now)}", highlight=False, soft_wrap=True)

    def _sentence(self, now: float) -> str:
        seconds = now - self._began
        speed = (self._text_bytes - self._text_bytes_before) / seconds / 1e6
        read = self._read - self._read_before
        left = _clock((self._total - self._read) / read * seconds) if read else "-:--"
        return f"{self.documents:,} documents, {self.tokens:,} tokens, {speed:.1f} MB/s of text, {left} left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
