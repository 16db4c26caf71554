"""What a test asks of a run that goes on, and what stands in its way."""

from __future__ import annotations

import fcntl
import os
import resource
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.runs import (
    Forked,
    Running,
    steps,
    wait_for,
)
from tests.launching import (
    PRETRAIN,
    processes_of,
)

ENDLESS = ["train.steps=100000", "checkpoint.every=0"]
"""Until somebody says stop; saves when somebody says save."""
MAY_MOUNT = subprocess.run(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL).returncode == 0
SMALL_FILE = 1000
"""Bytes."""


def save(run: Running, run_dir: Path, kind: str) -> None:
    """Ask for a save and wait for an event of that kind, which says how it went."""
    wait_for(lambda: recorded(run_dir, "train"), run)
    before = len(steps(run_dir, kind))
    (run_dir / "SAVE").touch()
    assert wait_for(lambda: len(steps(run_dir, kind)) > before, run), "the run has ended"


def stop(run_dir: Path) -> None:
    (run_dir / "STOP").touch()


def trains(pid: int, run_dir: Path) -> bool:
    """Whether the process is a rank that has trained a step, on a disk that it may see alone."""
    try:
        started = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:2] == [PRETRAIN.encode()]
        return started and b'"train"' in Path(f"/proc/{pid}/root{run_dir}/metrics.jsonl").read_bytes()
    except OSError:
        return False


def recorded(run_dir: Path, kind: str) -> bool:
    return (run_dir / "metrics.jsonl").exists() and bool(steps(run_dir, kind))


def writers(run: Forked, home: Path) -> dict[int, int]:
    """The process that writes, of each rank."""
    ranks, found = {pid: rank for rank, pid in run.ranks().items()}, {}
    for pid in processes_of(home):
        with suppress(OSError):
            if b"megallama.checkpoint.writing.writer" in Path(f"/proc/{pid}/cmdline").read_bytes():
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                found[ranks[parent]] = pid
    return found


def ended(pid: int) -> bool:
    """Whether all that a process held is closed: its command line is gone before its pipes are."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def waiting_orders(pid: int) -> int:
    """Bytes on the input of a writing process that it has not read."""
    with Path(f"/proc/{pid}/fd/0").open("rb", buffering=0) as pipe:
        (count,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))
    return int(count)


@contextmanager
def limited(pid: int) -> Iterator[None]:
    """The process can write no file beyond a small size, as if its disk were full."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def undeletable(path: Path) -> Iterator[None]:
    """A file that nobody can delete, root neither."""
    root = os.geteuid() == 0
    descriptor = os.open(path if root else path.parent, os.O_RDONLY)
    if not root:
        os.fchmod(descriptor, 0o500)
    elif not set_immutable(descriptor, True):
        pytest.skip("root can delete anything on this file system")
    try:
        yield
    finally:
        if root:
            set_immutable(descriptor, False)
        else:
            os.fchmod(descriptor, 0o700)
        os.close(descriptor)


def set_immutable(descriptor: int, immutable: bool) -> bool:
    """As chattr does; False where the file system knows no such flag."""
    get_flags, set_flags, immutable_flag = 0x80086601, 0x40086602, 0x10
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(descriptor, get_flags, struct.pack("l", 0)))
        flags = flags | immutable_flag if immutable else flags & ~immutable_flag
        fcntl.ioctl(descriptor, set_flags, struct.pack("l", flags))
    except OSError:
        return False
    return True
