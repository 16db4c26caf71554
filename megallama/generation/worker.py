"""One thread that writes for many clients: rows wait in order for a place in the batch, and join at any step."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from megallama.generation.batch import Batch, Row
from megallama.generation.load import Loaded

Tell = Callable[[Row, str], None]
"""Called by the thread with new text of a row; `row.ended` says whether it is the last."""


class RefusedError(RuntimeError):
    """No row was taken: too many wait, or the worker ends."""


class Worker:
    """Writes rows, `size` at once, while up to `max_waiting` others wait."""

    def __init__(self, loaded: Loaded, size: int, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.failure: BaseException | None = None
        """What ended the thread before its time."""
        self._batch, self._waiting = Batch(loaded, size), deque[Row]()
        self._tell: dict[Row, Tell] = {}
        self._cancelled: list[Row] = []
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="writer")
        self._thread.start()

    @property
    def closing(self) -> bool:
        """No more rows are taken."""
        return self._deadline is not None

    @property
    def load(self) -> tuple[int, int]:
        """Rows that are written at present, and rows that wait."""
        return len(self._batch.rows), len(self._waiting)

    def submit(self, rows: Sequence[Row], tell: Tell) -> None:
        """Take rows, all or none; RefusedError, a sentence, where there is no room."""
        with self._changed:
            if self._deadline is not None:
                raise RefusedError("the server is shutting down; ask another")
            free = self._batch.size - len(self._batch.rows)
            if len(self._waiting) + len(rows) > self.max_waiting + free:
                full = f"{len(self._waiting)} texts wait for their turn, of at most {self.max_waiting}"
                raise RefusedError(f"{full}; try again later")
            self._waiting.extend(rows)
            self._tell.update(dict.fromkeys(rows, tell))
            self._changed.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Give up rows that nobody waits for any more; those that have ended are none."""
        with self._changed:
            self._cancelled += rows
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Take no more rows, finish those that are written or wait for so long, and end."""
        with self._changed:
            self._deadline = min(self._deadline or math.inf, time.monotonic() + seconds)
            self._changed.notify()

    def join(self) -> None:
        """Wait for the end of the thread, and raise what ended it before its time."""
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while self._arrange():
                for row, text in self._batch.step():
                    self._say(row, text)
        except BaseException as failure:  # clients wait for this thread: it may not leave without a word
            self.failure = failure
        with self._changed:
            self._deadline = 0.0
            for row in list(self._tell):
                row.ended = "error"
                self._say(row, "")

    def _say(self, row: Row, text: str) -> None:
        tell = self._tell.get(row)
        if tell is not None and (text or row.ended):
            tell(row, text)
        if row.ended:
            self._tell.pop(row, None)

    def _arrange(self) -> bool:
        """Wait for rows, and bring them into the batch; whether there is any to write."""
        batch = self._batch
        with self._changed:
            while True:
                for row in self._cancelled:
                    self._tell.pop(row, None)
                    if row in self._waiting:
                        self._waiting.remove(row)
                    elif row in batch.rows:
                        batch.remove(row)
                self._cancelled.clear()
                while self._waiting and len(batch.rows) < batch.size:
                    batch.add(self._waiting.popleft())
                if self._deadline is not None and time.monotonic() > self._deadline:
                    return False
                if batch.rows or self._deadline is not None:
                    return bool(batch.rows)
                self._changed.wait()
