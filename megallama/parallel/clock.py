"""What a rank spends its time on: at every moment one thing, on a GPU as its stream sees it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch.profiler import record_function

from megallama.config.schema import AXIS_KEYS

WORK = ("data", "forward", "backward", "optimizer", "other")
"""What a rank does alone, however long others take; `other` is what has no name of its own."""
TALK = (*AXIS_KEYS.values(), "data_parallel")
"""Collectives and messages, and waiting for those that are late to them, by the axis."""
SPANS = (*WORK, *TALK, "evaluation", "checkpoint", "trace")
"""Of a clock. The last three are what training waits for."""
Marks: TypeAlias = list[tuple[str, Any]]
"""What begins, and when."""

_SENDS = frozenset(
    (
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_coalesced",
        "reduce_scatter_tensor",
        "broadcast",
        "reduce",
        "all_to_all_single",
        "wait",
    )
)
"""What DeepSpeed calls while it trains, of its backend and of what that returns."""


class Clock:
    """Times the spans of one rank, from one `take` to the next.

    On a GPU the marks are events on the stream that computes: nothing waits for them, and a message that is sent beside
    what it computes takes no time. Two events for each collective cost about 5 µs. A trace of torch's profiler shows
    the spans by their names.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._now = "other"
        self._whole = False
        self._marks: Marks = [(self._now, self._mark())]

    @contextmanager
    def span(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """Inside, time is that of `name`, one of SPANS, but for spans within, which `whole` makes part of it."""
        if self._whole:
            yield
            return
        before, self._whole = self._now, whole
        self._turn(name)
        try:
            with record_function(name) if torch.autograd._profiler_enabled() else nullcontext():
                yield
        finally:
            self._whole = False
            self._turn(before)

    def take(self) -> Marks:
        """What happened since the last call, for `seconds`."""
        self._turn(self._now)
        taken, self._marks = self._marks, self._marks[-1:]
        return taken

    def seconds(self, marks: Marks) -> list[float]:
        """Of each of SPANS. On a GPU this waits until the last of the marks has passed."""
        found = dict.fromkeys(SPANS, 0.0)
        for (name, began), (_, ended) in pairwise(marks):
            found[name] += self._between(began, ended)
        return list(found.values())

    def _turn(self, name: str) -> None:
        self._now = name
        self._marks.append((name, self._mark()))

    def _mark(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _between(self, began: Any, ended: Any) -> float:
        if self._stream is None:
            return float(ended - began)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3


class Timed:
    """A library's way to torch's collectives, inside `timed` while it sends and while a message is waited for."""

    def __init__(self, inner: Any, timed: Callable[[], AbstractContextManager[None]]) -> None:
        self.inner: Any = inner.inner if isinstance(inner, Timed) else inner  # timed before, with another clock
        self._timed = timed

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name not in _SENDS:
            return found

        @wraps(found)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._timed():
                sent = found(*args, **kwargs)
            return Timed(sent, self._timed) if hasattr(sent, "wait") else sent

        return timed
