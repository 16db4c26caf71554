"""One place, one writer: a lock that the kernel takes back when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from megallama.errors import UserError

LOCK = "lock"
_HANDOVER_SECONDS = 10.0
"""A killed run may take a moment to be gone, and a job that is requeued comes at once."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Place:
    """What is locked, in the words of a refusal."""

    name: str
    """As it was typed: `run.dir=runs/debug`."""
    end: str
    """How its holder comes to an end."""
    other: str
    """How to use another place."""


class Lock:
    """Held from creation to `release`, the end of a `with` or of the process. UserError if another process holds it.

    `path` is a file that names its holder. `folder`, if given, is locked as well where its file system can: it is still
    held after somebody has removed the file. On a file system that several nodes share it must carry locks between
    them: NFS 4, GPFS, Lustre with `flock` do.
    """

    def __init__(self, path: Path, place: Place, *, folder: Path | None = None, handover_seconds: float = 0.0) -> None:
        self._path, self._place = path, place
        self._folder: int | None = None
        with suppress(OSError):  # one that cannot be read cannot be locked; the file says what is wrong with it
            self._folder = None if folder is None else os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._deadline = time.monotonic() + handover_seconds
        try:
            if self._folder is not None:
                self._wait_for(self._folder, required=False)
            self._file = self._locked_file()
        except UserError:
            self._release_folder()
            raise
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        with suppress(OSError):  # a full disk takes no facts; the lock holds without them
            self._file.truncate(0)
            self._file.write(json.dumps(facts).encode())

    def stands(self) -> bool:
        """Whether the file is still the one that is locked. Somebody who removed it has let others in."""
        return not self._file.closed and _is_at(self._file, self._path)

    def check(self) -> None:
        """UserError unless it stands: for a writer, before it replaces anything."""
        if not self.stands():
            raise UserError(
                f"{self._place.name} is no longer this command's: its lock {self._path} was removed, so another may "
                "write there; nothing was replaced, repeat the command"
            )

    def release(self) -> None:
        """Let others in."""
        self._file.close()
        self._release_folder()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _release_folder(self) -> None:
        if self._folder is not None:
            os.close(self._folder)
        self._folder = None

    def _locked_file(self) -> FileIO:
        while True:
            try:
                file = self._path.open("ab", buffering=0)
            except OSError as error:
                raise UserError(
                    f"{self._place.name} cannot be written ({self._path}: {error.strerror or error}); "
                    f"{self._place.other}"
                ) from None
            try:
                self._wait_for(file.fileno(), required=True)
            except UserError:
                file.close()
                raise
            if _is_at(file, self._path):
                return file
            file.close()  # its last holder removed it, and another process may hold the next one

    def _wait_for(self, descriptor: int, *, required: bool) -> None:
        """Lock it; without `required`, leave a file system alone that cannot. UserError if the deadline passes."""
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
            except OSError as error:
                if not required:
                    return  # NFS locks what can be written, so no folders
                raise UserError(
                    f"{self._place.name} is on a file system without locks ({error.strerror}); mount it with flock, "
                    f"or {self._place.other}"
                ) from None
            if time.monotonic() > self._deadline:
                raise UserError(
                    f"{self._place.name} is in use by {_holder(self._path)}; {self._place.end}, or {self._place.other}"
                )
            time.sleep(_POLL_SECONDS)


class RunLock(Lock):
    """The lock of a run directory. A start waits a moment for one that is about to end."""

    def __init__(self, run_dir: Path, handover_seconds: float = _HANDOVER_SECONDS) -> None:
        place = Place(f"run.dir={run_dir}", f"stop that run (touch {run_dir / 'STOP'})", "use another run.dir")
        super().__init__(run_dir / LOCK, place, folder=run_dir, handover_seconds=handover_seconds)

    def lost(self) -> str | None:
        """Why the run directory is not the holder's any more, as a sentence; None while it is."""
        try:
            there = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            gone = self._path if self._path.parent.is_dir() else self._path.parent
            return f"{gone} is gone: it was removed or renamed while the run was running, and nothing more is saved"
        except OSError:  # the disk is away for a moment, which says nothing
            return None
        if os.path.samestat(there, os.fstat(self._file.fileno())):
            return None
        return (
            f"{self._path} is another file now: the run directory was replaced while the run was running, "
            "and nothing more is saved"
        )


@contextmanager
def output_lock(lock_file: Path, name: str, option: str) -> Iterator[Lock]:
    """The lock of the output `name`, as typed after the option `option`. Folders that `lock_file` needs are made.

    A second writer is refused at once. The file is gone afterwards, and so are folders that were made and stayed empty.
    UserError as `Lock` raises it.
    """
    place = Place(name, "wait until it has ended", f"choose another {option}")
    made: list[Path] = []
    try:
        made += [folder for folder in (lock_file.parent, *lock_file.parent.parents) if not folder.exists()]
        if made:
            lock_file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name} cannot be made ({error.strerror}); mend that or {place.other}") from None
    try:
        with Lock(lock_file, place) as lock:
            try:
                yield lock
            finally:
                if lock.stands():  # it goes while it is held: who waits for it sees that it is gone
                    lock_file.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def beside(path: Path) -> Path:
    """Where the lock of an output is that is no folder, or a prefix of several files."""
    return path.with_name(f".{path.name}.lock")


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        job = f", job {facts['job']}" if facts["job"] else ""
        return f"process {facts['pid']} on {facts['host']}{job}"
    except FileNotFoundError:
        return f"another process, whose lock {path} was removed"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
