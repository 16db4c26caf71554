"""Documents and tokens so far, shown on a terminal while a dataset is built."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

SILENT_SECONDS = 2.0


class Counter:
    """Counts, and shows the counts once the build has taken SILENT_SECONDS."""

    def __init__(self, console: Console) -> None:
        self.documents = 0
        self.tokens = 0
        self._begin = time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("tokenising")

    def __enter__(self) -> Counter:
        return self

    def add(self, documents: int, tokens: int) -> None:
        """Count more of them."""
        self.documents += documents
        self.tokens += tokens
        if time.monotonic() - self._begin > SILENT_SECONDS:
            self._progress.start()
        description = f"tokenising: {self.documents:,} documents, {self.tokens:,} tokens"
        self._progress.update(self._task, description=description)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
