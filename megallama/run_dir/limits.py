"""What a run needs of its machine before it begins: a directory, room on the disk, what `ulimit` allows. No torch."""

from __future__ import annotations

import os
import re
import resource
import shutil
from pathlib import Path

from megallama.errors import UserError

_DEEPEST = Path("checkpoints", ".partial-step_00000000", "tensors-00000-of-00000.bin")
"""About as long as what a run writes below its directory."""

LEAST_OPEN_FILES = 128
"""A rank alone takes 40, and connections to each other one: of the saver's group, on a CPU of all, and the store's."""
LEAST_ADDRESSES = 1 << 30
"""Bytes: torch and its threads."""
LEAST_FILE = 1 << 20
"""Bytes: what a rank writes beside checkpoints."""


def check_run_dir(folder: Path, needed: int) -> None:
    """UserError where the run directory cannot be made or written to, or has no room for a checkpoint of that size."""
    if re.match(r"[A-Za-z][\w+.-]*:/", str(folder)):
        raise UserError(f"run.dir={folder} is a URL, and a run is saved on a disk; name a folder there")
    try:
        there = _nearest(folder.absolute())
    except OSError as error:
        raise UserError(f"run.dir={folder} cannot be made ({error.strerror}); use another run.dir") from None
    if not there.is_dir():
        raise UserError(f"run.dir={folder} cannot be made: {there} is not a folder; use another run.dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={folder} cannot be written: {there} is read-only for this user; use another run.dir")
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"run.dir={folder} has {free / 1e9:.2f} GB of free disk, and a checkpoint takes {needed / 1e9:.2f} GB; "
            "free some, or use another run.dir"
        )


def _nearest(folder: Path) -> Path:
    """The folder or what stands in its way: the nearest above it that is there, be it a link that leads nowhere.

    OSError where no such path can be, or where what a run writes below it would have too long a name.
    """
    for path in (folder / _DEEPEST, *(folder / _DEEPEST).parents):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if path in (folder, *folder.parents):
            return path
    raise AssertionError("the root is there")


def check_limits(world_size: int, written: int) -> None:
    """UserError where a limit of this process is below what a rank of so many takes, which writes so much of a save."""
    file = max(LEAST_FILE, written)
    for number, letter, what, least in (
        (resource.RLIMIT_NOFILE, "n", "open files", LEAST_OPEN_FILES + 3 * world_size),
        (resource.RLIMIT_AS, "v", "bytes of address space", LEAST_ADDRESSES),
        (resource.RLIMIT_FSIZE, "f", "bytes in one file", file),
    ):
        limit, _ = resource.getrlimit(number)
        if limit != resource.RLIM_INFINITY and limit < least:
            raise UserError(too_little(limit, letter, what, least))


def too_little(limit: int, letter: str, what: str, least: int) -> str:
    """The sentence about one limit."""
    return (
        f"`ulimit -{letter}` allows {limit:,} {what}, and a rank of this run needs {least:,}; "
        f"use `ulimit -{letter} {'unlimited' if letter != 'n' else 1 << least.bit_length()}`, or ask who sets it"
    )
