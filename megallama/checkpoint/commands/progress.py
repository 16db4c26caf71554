"""What is being read, shown on a terminal once it takes long. On stderr, so that a pipe gets the result alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

SILENT_SECONDS = 2.0


@contextmanager
def shown() -> Iterator[Callable[[str], None]]:
    """Gives a function that takes what is being read now."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    # stdout is not redirected: it may be a pipe.
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = progress.add_task("reading")
    timer = Timer(SILENT_SECONDS, progress.start)
    if console.is_terminal:
        timer.start()
    try:
        yield lambda text: progress.update(task, description=text)
    finally:
        if console.is_terminal:
            timer.cancel()
            timer.join()
            progress.stop()
