"""A rank that waits for ever is found, says where it stands, and ends.

A thread of its own notices what takes far longer than it did before. It writes the Python stacks of all threads and
the last collectives, and ends the process; the launcher then ends the others. Where the hang holds the interpreter's
lock, in which that thread could not run, `faulthandler` writes the stacks from outside it and ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megallama.parallel.flight_recorder import last_collectives
from megallama.system.signals import tell
from megallama.system.whole_file import put

_RECENT = 20
_STDERR = 2
_GRACE_SECONDS = 5.0
"""Between the stacks and the end: the end of one rank breaks the others out of where they hang."""
_LOCKED_OUT_SECONDS = 60.0
"""After which the thread is taken to be kept from running."""


@dataclass(frozen=True)
class Phase:
    """What a rank does now."""

    kind: str
    began: float
    limit: float
    """Seconds that it may take."""


class Watchdog:
    """Watches one rank from the first `now` to `close`.

    A phase may take `factor` times the recent median of its kind, and at least `least_seconds`; while there is nothing
    to compare with, and where it waits for a disk, at least `first_seconds`. `hung` is called before the end, with what
    hung and for how long.
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
        self._phase: Phase | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def now(self, kind: str, *, patient: bool = False) -> None:
        """End the phase before and begin another, as "step"; with `patient`, one that waits for a disk."""
        at, before = time.monotonic(), self._phase
        if before is not None:
            self._taken.setdefault(before.kind, deque(maxlen=_RECENT)).append(at - before.began)
        recent = self._taken.get(kind)
        least = self._least if recent and not patient else self._first
        self._phase = Phase(kind, at, max(least, self._factor * median(recent)) if recent else least)
        # To the log: a file would have to be open on every rank of every run.
        faulthandler.dump_traceback_later(self._phase.limit + _LOCKED_OUT_SECONDS, file=_STDERR, exit=True)

    def close(self) -> None:
        """Watch no more."""
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._least / 10)):
            phase = self._phase
            if phase is not None and time.monotonic() - phase.began > phase.limit:
                self._end(phase)

    def _end(self, phase: Phase) -> None:
        taken = time.monotonic() - phase.began
        sentence = f"{phase.kind} hangs: {taken:.0f} s, where {phase.limit:.0f} s is the most it may take"
        where = f"stacks are in {self._path}"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("w") as stacks:
                print(sentence, file=stacks, flush=True)
                faulthandler.dump_traceback(file=stacks, all_threads=True)
        except OSError as error:  # the disk may be what hangs the run: it ends all the same
            where = f"stacks cannot be written to {self._path} ({error.strerror})"
        self._hung(sentence)
        tell(f"{sentence}; {where}")
        # After all that must be said: a driver that hangs may hold it until `faulthandler` ends the process.
        with suppress(Exception):
            put(self._path.with_name(f"collectives_{self._path.stem}"), last_collectives())
        time.sleep(_GRACE_SECONDS)
        os._exit(1)
