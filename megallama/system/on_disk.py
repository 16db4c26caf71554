"""Files and names that have reached the disk, and would be there after a loss of power.

It imports little: every rank starts a process for it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_PIECE = 1 << 24
"""Bytes written at once."""


def write_on_disk(path: Path, content: bytes | memoryview) -> str:
    """Write a new file in pieces, reach the disk before returning, and give its SHA-256."""
    view, digest = memoryview(content), hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            digest.update(piece)
            while piece:
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
