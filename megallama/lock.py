"""One run directory, one writer: a lock that the kernel takes back when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from megallama.errors import UserError

LOCK = "lock"
_HANDOVER_SECONDS = 10.0
"""A killed holder may take a moment to be gone, and a job that is requeued comes at once."""


class RunLock:
    """Held from creation to `release` or the end of the process. UserError if another process holds it.

    On a file system that several nodes share it must carry locks between them: NFS 4, GPFS, Lustre with `flock` do.
    """

    def __init__(self, run_dir: Path, handover_seconds: float = _HANDOVER_SECONDS) -> None:
        self._path = path = run_dir / LOCK
        try:
            self._file = path.open("a+")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); use another run.dir") from None
        deadline = time.monotonic() + handover_seconds
        while not _taken(self._file.fileno()):
            if time.monotonic() > deadline:
                self._file.seek(0)
                raise UserError(
                    f"run.dir={run_dir} is in use by {_holder(self._file.read())}; stop that run (touch "
                    f"{run_dir / 'STOP'}), or use another run.dir"
                )
            time.sleep(0.2)
        self._file.truncate(0)
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        self._file.write(json.dumps(facts))
        self._file.flush()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

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


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"run.dir is on a file system without locks ({error.strerror}); mount it with flock, or use another run.dir"
        ) from None
    return True


def _holder(content: str) -> str:
    try:
        facts = json.loads(content)
    except ValueError:
        return "another process"
    job = f", job {facts['job']}" if facts["job"] else ""
    return f"process {facts['pid']} on {facts['host']}{job}"
