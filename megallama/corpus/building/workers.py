"""Worker processes that read and tokenise: only tasks and counts pass between them and the build.

A worker ends with its parent, however that ends.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from megallama.corpus.building.recipe import Share, Unit
from megallama.corpus.building.shard import Counts, write_shard
from megallama.corpus.building.shards import shard_path
from megallama.corpus.reading.blocks import Block, Reading, read_blocks
from megallama.corpus.reading.lines import refusals_named
from megallama.errors import UserError
from megallama.system.remote import SourcePath, open_source_file
from megallama.system.signals import signals_later
from megallama.text.tokenizer import Encoder


class Task(NamedTuple):
    """Shards of a unit to make: of the blocks of a share, but those in `skip`. Without a share, its files to hash."""

    unit: Unit
    share: Share | None
    skip: frozenset[int]


class Made(NamedTuple):
    """A shard stands."""

    unit: str
    number: int
    counts: Counts
    read: int
    """Bytes of the file that are done with, beyond those that were told before."""


class Ended(NamedTuple):
    """A task is done."""

    unit: str
    share: Share | None
    blocks: int
    """One more than the highest number of a block of the share."""
    sha256: tuple[str, ...]
    """Of each file, where there was no share."""
    read: int
    """As in `Made`."""


Message = Made | Ended
_Failure = UserError | OSError | MemoryError


class WorkerLostError(Exception):
    """A worker process was killed."""


@dataclass(frozen=True)
class Job:
    """What every task of a build has in common but its encoder."""

    folder: Path
    reading: Reading
    dtype: np.dtype[Any]
    hashed: bool


def perform(task: Task, job: Job, encoder: Encoder) -> Iterator[Message]:
    """Do a task here. UserError for a source that cannot be read, OSError for a folder that cannot be written."""
    if task.share is None:
        yield Ended(task.unit.key, None, 0, tuple(_sha256(file.source) for file in task.unit.files), 0)
        return
    blocks, told = max(task.skip, default=-1) + 1, 0
    for block in _blocks(task, job):
        path = shard_path(job.folder, task.unit, block.number)
        counts = write_shard(path, block.documents, block.left_out, encoder, job.dtype, hashed=job.hashed)
        blocks = max(blocks, block.number + 1)
        read = block.file_bytes // task.share[1]
        yield Made(task.unit.key, block.number, counts, read - told)
        told = read
    yield Ended(task.unit.key, task.share, blocks, (), task.unit.bytes // task.share[1] - told)


def _blocks(task: Task, job: Job) -> Iterator[Block]:
    reading = job.reading
    assert task.share is not None
    if len(task.unit.files) == 1:
        yield from read_blocks(task.unit.files[0].source, reading, task.share, task.skip)
    elif 0 not in task.skip:
        left_out = Counter[str]()
        yield Block(0, _documents_of_all(task.unit, job, left_out), left_out, 0)


def _documents_of_all(unit: Unit, job: Job, left_out: Counter[str]) -> Iterator[str]:
    for file in unit.files:
        for block in read_blocks(file.source, job.reading):
            yield from block.documents
            left_out.update(block.left_out)


def _sha256(path: SourcePath) -> str:
    with refusals_named(path), open_source_file(path) as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


class Team(Protocol):
    """Whoever does the tasks of a build."""

    def messages(self, *, block: bool) -> list[Message] | None:
        """The next ones; without `block` those that are there. None when all tasks are done.

        UserError and OSError as `perform`; WorkerLostError if a process was killed.
        """

    def close(self) -> None:
        """Stop at once."""


class Here:
    """This process alone."""

    def __init__(self, tasks: Sequence[Task], job: Job, encoder: Encoder) -> None:
        self._messages = self._perform(tasks, job, encoder)

    def messages(self, *, block: bool) -> list[Message] | None:
        if not block:
            return []
        message = next(self._messages, None)
        return None if message is None else [message]

    def _perform(self, tasks: Sequence[Task], job: Job, encoder: Encoder) -> Generator[Message]:
        for task in tasks:
            yield from perform(task, job, encoder)

    def close(self) -> None:
        self._messages.close()


class Workers:
    """Processes of their own.

    Each says that it has started by sending None, and gets the encoder of the build itself: what that was loaded from
    may be another one by now.
    """

    def __init__(self, tasks: Sequence[Task], job: Job, encoder: Encoder, count: int) -> None:
        self._tasks = deque(tasks)
        self._encoder = pickle.dumps(encoder)
        self._busy: set[Connection] = set()
        self._processes: dict[Connection, SpawnProcess] = {}
        # Not fork: a copy of a process in which torch has started threads can hang.
        context = multiprocessing.get_context("spawn")
        ensure_running()  # which lets a Ctrl-C through again: not while a worker starts, which inherits that
        try:
            for _ in range(count):
                # A terminal sends a Ctrl-C to all: a worker heeds it once it can be silent. And one whose parent ends
                # before it has said what is to be done prints a traceback.
                with signals_later(), _lean():
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, job), daemon=True)
                    process.start()
                    theirs.close()
                    self._processes[ours] = process
                self._busy.add(ours)
        except BaseException:
            self.close()
            raise

    def messages(self, *, block: bool) -> list[Message] | None:
        if not self._busy:
            return None
        found: list[Message] = []
        for connection in wait(list(self._processes), None if block else 0):
            assert isinstance(connection, Connection)
            with _lost_workers_told():
                found += self._received(connection)
        return found

    def close(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for connection, process in self._processes.items():
            process.join()
            connection.close()

    def _received(self, connection: Connection) -> list[Message]:
        message: Message | _Failure | None = connection.recv()
        if isinstance(message, UserError | OSError | MemoryError):
            raise message
        if message is None:
            connection.send_bytes(self._encoder)
        if not isinstance(message, Made):
            self._hand_out(connection)
        return [] if message is None else [message]

    def _hand_out(self, connection: Connection) -> None:
        if self._tasks:
            connection.send(self._tasks.popleft())
        else:
            self._busy.remove(connection)


@contextmanager
def _lean() -> Iterator[None]:
    """Start processes without the script that this one began with, and each with no thread of BLAS for every CPU."""
    main, threads = sys.modules["__main__"], os.environ.get("OMP_NUM_THREADS")
    sys.modules["__main__"], os.environ["OMP_NUM_THREADS"] = ModuleType("__main__"), "1"
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        del os.environ["OMP_NUM_THREADS"]
        os.environ |= {} if threads is None else {"OMP_NUM_THREADS": threads}


@contextmanager
def _lost_workers_told() -> Iterator[None]:
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise WorkerLostError from None


def _serve(connection: Connection, job: Job) -> None:
    """What a worker process does."""
    _stand_alone()
    try:
        connection.send(None)
        encoder: Encoder = connection.recv()
        while True:
            for message in perform(connection.recv(), job, encoder):
                connection.send(message)
    except (EOFError, BrokenPipeError):  # the parent needs no more
        return
    except (UserError, OSError, MemoryError) as error:
        connection.send(error)


def _stand_alone() -> None:
    """End this worker without a word at a Ctrl-C, of which its parent speaks for all, and when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
