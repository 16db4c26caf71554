"""How far a fetch is: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megallama.corpus.fetching.download import Told

LINE_SECONDS = 30.0


class FetchProgress:
    """Shows each file of a fetch while it arrives, as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        remaining = TimeRemainingColumn()
        self._bars = Progress(*columns, remaining, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def file(self, name: str, number: int, files: int) -> Iterator[Told]:
        """While file `number` of `files` arrives; gives what is to be called with its bytes that are there, and all."""
        title = f"{number}/{files} {name}"
        bar = self._bars.add_task(title, total=None)
        begin: tuple[float, int] | None = None
        spoken, last = time.monotonic(), 0

        def told(there: int, size: int | None) -> None:
            nonlocal begin, spoken, last
            now, last = time.monotonic(), there
            begin = begin or (now, there)
            self._bars.update(bar, completed=there, total=size)
            if now - spoken > LINE_SECONDS:
                rate = max(there - begin[1], 0) / max(now - begin[0], 1e-9)
                of = f" of {size / 1e6:,.1f}" if size else ""
                left = f", {(size - there) / rate / 60:,.0f} min left" if size and rate else ""
                self._say(f"{title}: {there / 1e6:,.1f}{of} MB, {rate / 1e6:,.1f} MB/s{left}")
                spoken = now

        yield told
        self._bars.remove_task(bar)
        self._say(f"{title}: {last / 1e6:,.1f} MB, complete")

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
