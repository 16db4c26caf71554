"""A process that writes what is in shared memory to the disk.

A thread would slow training down through the interpreter's lock. It imports no torch, and where it does not commit
nothing but the standard library, so it starts at once and takes few megabytes. It takes orders as lines of JSON on its
input, answers each with one line, and ends with its parent.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megallama.system.on_disk import write_on_disk
from megallama.system.signals import deaf

Answer = dict[str, Any]
_SET_PARENT_DEATH_SIGNAL = 1
_NICE = 10
"""A tenth of a core beside training on all cores; at 19 it would be a seventieth, and a save would take minutes."""
_NOT_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""A save must not end half way."""
_LAST_OF_BEST_EFFORT = (2 << 13) | 7
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}


class Writer:
    """The process, as the one that gives it orders sees it. It reads the memory behind `descriptor`.

    Only where it `commits` does it make checkpoints of files, and delete old ones.
    """

    def __init__(self, descriptor: int, size: int, *, commits: bool) -> None:
        self._descriptor, self._size, self._commits = descriptor, size, commits
        self._process = self._start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def order(self, what: str, **arguments: Any) -> Answer:
        """Give an order and wait for the answer, which has an `error` where the order could not be carried out."""
        try:
            if self._process.poll() is not None:  # somebody killed it: the memory is still there for another
                self.close()
                self._process = self._start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
            self._process.stdin.flush()
            answer: Answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            return {"error": f"the writing process is gone (exit code {self._process.wait()})"}
        return answer

    def close(self) -> None:
        """End the process, which is between orders."""
        self._process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        words = [str(self._descriptor), str(self._size), str(os.getpid()), str(int(self._commits))]
        with deaf(_NOT_HEARD):  # Slurm signals every process of a job, a terminal all that it shows
            return subprocess.Popen(
                [sys.executable, "-m", "megallama.checkpoint.writing.writer", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self._descriptor],
                text=True,
            )


def main(descriptor: int, size: int, parent: int, commits: int) -> None:
    """Carry out orders until the input ends."""
    _stay_behind(parent)
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as memory, memoryview(memory) as view:
        orders: dict[str, Callable[..., Answer]] = {
            "write": lambda path, bytes: _write(Path(path), view[:bytes]),
            "drop": _drop,
        }
        if commits:
            orders |= _orders_of_commits()
        for line in sys.stdin:
            order = json.loads(line)
            began = time.process_time()
            try:
                answer = orders[order.pop("what")](**order)
            except OSError as error:
                answer = {"error": f"{error.filename or order.get('path') or 'write'}: {error.strerror}"}
            print(json.dumps(answer | {"cpu_seconds": time.process_time() - began}), flush=True)


def _write(path: Path, content: memoryview) -> Answer:
    path.parent.parent.mkdir(exist_ok=True)  # and no more: a run directory that is gone is not made anew
    path.parent.mkdir(exist_ok=True)
    return {"bytes": len(content), "sha256": write_on_disk(path, content)}


def _orders_of_commits() -> dict[str, Callable[..., Answer]]:
    # Imported at the start: the files of a program may be others by the time of the first save.
    from megallama.checkpoint.format import File
    from megallama.checkpoint.writing.commit import Retention, apply_retention, commit

    def commit_files(
        partial: str,
        final: str,
        written: dict[str, dict[str, Any]],
        documents: dict[str, object],
        saved: float,
        versions: dict[str, str],
    ) -> Answer:
        files = {name: File(**file) for name, file in written.items()}
        return {"warnings": commit(Path(partial), Path(final), files, documents, saved, versions)}

    def apply(path: str, retention: dict[str, int], proven: bool) -> Answer:
        return {"warnings": apply_retention(Path(path), Retention(**retention), proven=proven)}

    return {"commit": commit_files, "apply_retention": apply}


def _drop(path: str) -> Answer:
    shutil.rmtree(path, ignore_errors=True)
    return {}


def _stay_behind(parent: int) -> None:
    """Give way to training, and end with the parent."""
    libc = ctypes.CDLL(None)
    libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    os.nice(_NICE)
    ioprio_set = _IOPRIO_SET.get(os.uname().machine)
    if ioprio_set is not None:
        libc.syscall(ioprio_set, 1, 0, _LAST_OF_BEST_EFFORT)
    if os.getppid() != parent:  # it went before the kernel was told
        sys.exit()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
