"""The limits of a process, as `ulimit` sets them: what is too little for a rank is said before it starts."""

from __future__ import annotations

import resource

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.room import checkpoint_bytes

LEAST_OPEN_FILES = 128
"""A rank alone takes 40."""
LEAST_ADDRESSES = 1 << 30
"""Bytes: torch and its threads."""
LEAST_FILE = 1 << 20
"""Bytes: what a rank writes beside checkpoints."""


def check_limits(config: RunConfig, world_size: int) -> None:
    """UserError where a limit of this process is below what a rank takes at least."""
    file = max(LEAST_FILE, checkpoint_bytes(config) // world_size)
    for number, letter, what, least in (
        (resource.RLIMIT_NOFILE, "n", "open files", LEAST_OPEN_FILES),
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
        f"use `ulimit -{letter} {'unlimited' if letter != 'n' else 1024}`, or ask who sets it"
    )
