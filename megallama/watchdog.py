"""A rank that waits for ever is found, says where it stands, and ends.

A thread of its own notices what takes far longer than it did before. It writes the Python stacks of all threads and
ends the process; the launcher then ends the others. Where the hang holds the interpreter's lock, in which that thread
could not run, `faulthandler` does the same from outside it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

_RECENT = 20
_STDERR = 2
_GRACE_SECONDS = 5.0
"""Between the stacks and the end: the end of one rank breaks the others out of where they hang."""
_LOCKED_OUT_SECONDS = 60.0
"""After which the thread is taken to be kept from running."""


class Watchdog:
    """Watches one rank from `start` to `close`.

    What is watched may take `factor` times its recent median, at least `least_seconds`, and `first_seconds` while there
    is nothing to compare with. `hung` is called before the end, with what hung and for how long.
    """

    def __init__(
        self,
        stacks: Path,
        hung: Callable[[str], None],
        factor: float,
        least_seconds: float,
        first_seconds: float,
    ) -> None:
        self._path, self._hung = stacks, hung
        self._factor, self._least, self._first = factor, least_seconds, first_seconds
        self._taken: dict[str, deque[float]] = {}
        self._watched: tuple[str, float, float] | None = None
        """What runs, since when, and for how long it may."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Watch what happens inside: "step", "evaluation" or "save", each compared with its own kind. Not nested."""
        before = self._taken.setdefault(what, deque(maxlen=_RECENT))
        limit = max(self._least, self._factor * median(before)) if before else self._first
        began = time.monotonic()
        self._watched = what, began, limit
        # To the log: a file would have to be open on every rank of every run.
        faulthandler.dump_traceback_later(limit + _LOCKED_OUT_SECONDS, file=_STDERR, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._watched = None
        before.append(time.monotonic() - began)

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._least / 10)):
            watched = self._watched
            if watched is not None and time.monotonic() - watched[1] > watched[2]:
                self._end(*watched)

    def _end(self, what: str, began: float, limit: float) -> None:
        sentence = f"{what} hangs: {time.monotonic() - began:.0f} s, where {limit:.0f} s is the most it may take"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w") as stacks:
            print(sentence, file=stacks, flush=True)
            faulthandler.dump_traceback(file=stacks, all_threads=True)
        self._hung(sentence)
        print(f"megallama: {sentence}; stacks are in {self._path}", file=sys.stderr, flush=True)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)
