"""What signals ask of a rank: to save and leave, or to leave at once.

SIGTERM and SIGUSR1 come from schedulers, which send them again and again: the rank saves once and leaves. SIGINT is
somebody's Ctrl-C and SIGHUP a terminal that was closed: the same where there is something to save, else the end at
once. A thread hears them, so that also a rank whose main thread stands in a collective for ever can be ended by hand.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

REPEATED = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask for a save, however often they come."""
BY_HAND = (signal.SIGINT, signal.SIGHUP)
STOP_SIGNALS = (*REPEATED, *BY_HAND)
_ECHO_SECONDS = 1.0
"""In which a launcher that passes a Ctrl-C on, and the terminal, may both have sent the first."""
_STDERR = 2
_TELL_SECONDS = 1.0


def hold_signals() -> None:
    """Let the repeated ones wait: before a run can heed them they would kill it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, REPEATED)


def hold_all_signals() -> None:
    """Let every stop signal wait for ever: all is done, and the interpreter ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def release_signals() -> None:
    """Take signals, also those that have waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REPEATED)


def end_by_signals() -> None:
    """Let signals end this process at once, as they do by default: it has nothing to save any more."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    release_signals()


@contextmanager
def deaf(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Let these signals wait; in processes that are started meanwhile they wait for ever, or until those take them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def end_in_order() -> Iterator[None]:
    """Let the first SIGTERM, SIGINT or SIGHUP end the block by a SystemExit, so that it clears up behind itself.

    The others do not disturb the clearing. Those that are ignored stay so, as `nohup` asks for. In the main thread.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, *BY_HAND)}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    heard: list[int] = []

    def end(number: int, _: object) -> None:
        if not heard:
            heard.append(number)
            raise SystemExit(128 + number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    except BaseException:
        if heard:  # a library that was about to call Python may have made another exception of it
            raise SystemExit(128 + heard[0]) from None
        raise
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextmanager
def signals_later() -> Iterator[None]:
    """Let a Ctrl-C and a SIGTERM wait until the end of the block, and be `deaf` to them; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            # Threads of libraries hear what this one is deaf to.
            signal.signal(number, lambda number, _: came.append(number))
    try:
        with deaf(before):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for one in came:
        signal.raise_signal(one)


class Signals:
    """What signals have asked of this process, once it has called `take`."""

    def __init__(self) -> None:
        self.asked = False
        """Whether to save and leave."""
        self.speaks = True
        """Whether to tell the terminal: one rank does it for all."""
        self._failed: Callable[[str], None] = lambda reason: None
        self._training, self._elastic = False, False
        self._interrupted: float | None = None

    def take(self) -> None:
        """Take over the signals of this process; in its main thread.

        SIGINT and SIGHUP stay ignored where they are, as `nohup` and the shell of a job in the background ask for.
        """
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        threading.Thread(target=self._listen, args=(ours,), name="signals", daemon=True).start()
        # The interpreter writes the number there at once, also while the main thread is in a call that never returns.
        signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number in REPEATED or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

    def record(self, failed: Callable[[str], None]) -> None:
        """Call `failed` with the reason before an end at once."""
        self._failed = failed

    def training(self, *, elastic: bool) -> None:
        """From now on there is something to save; `elastic`: under torchrun."""
        self._training, self._elastic = True, elastic

    def hear(self, number: int, now: float) -> None:
        """Do what a signal asks that came at `now`, in seconds of any clock."""
        again = self._interrupted is not None and now - self._interrupted > _ECHO_SECONDS
        # torchrun passes the first Ctrl-C on as what it is, and makes SIGTERM of the second.
        if again and (number == signal.SIGINT or (number == signal.SIGTERM and self._elastic)):
            self._end(signal.SIGINT, "ended by a second Ctrl-C before the save was done")
        if number in BY_HAND and not self._training:
            self._end(number, f"ended by {_name(number)} before the first step")
        if number == signal.SIGINT and self._interrupted is None:
            self._interrupted = now
            self._say("Ctrl-C: this step is finished and saved; once more ends at once, without the save")
        self.asked = True

    def _listen(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                if number in STOP_SIGNALS:
                    self.hear(number, time.monotonic())

    def _end(self, number: int, reason: str) -> None:
        self._failed(reason)
        self._say(f"{reason}; what was saved is safe, and the same command continues")
        os._exit(128 + number)

    def _say(self, sentence: str) -> None:
        if self.speaks:
            tell(sentence)


def tell(sentence: str) -> None:
    """Print it to stderr, or give up after a second: a terminal that takes nothing keeps no process from ending."""

    def write() -> None:
        with suppress(OSError):  # the terminal may be what is gone
            os.write(_STDERR, f"megallama: {sentence}\n".encode())

    telling = threading.Thread(target=write, daemon=True)
    telling.start()
    telling.join(_TELL_SECONDS)


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else "the end of its terminal"
