"""Files that appear whole or not at all: written beside their place, under a name of their own, then renamed."""

from __future__ import annotations

import glob
from pathlib import Path
from uuid import uuid4


def temporary(path: Path) -> Path:
    """A name beside `path` that no other writer takes; `remove_leftovers` knows those of writers that were killed."""
    return path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")


def put(path: Path, content: bytes) -> None:
    """Replace the content of `path`."""
    written = temporary(path)
    try:
        written.write_bytes(content)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path`, of which no writer may be alive."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.????????.tmp"):
        leftover.unlink(missing_ok=True)
