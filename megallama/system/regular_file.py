"""Opening files that must be regular ones: a FIFO in their place would be waited for without end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_PIECE = 1 << 20


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """`path`, open to read bytes; OSError if it cannot be, or is a FIFO, a device or anything else but a file.

    Without `follow`, a symbolic link is none either.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except ValueError:
        raise OSError(errno.EINVAL, "its name is not legal") from None
    file = open(descriptor, "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file


def read_regular(path: Path, most: int, *, follow: bool = True) -> bytes:
    """The content of `path`; OSError as `open_regular`, or if it has more than `most` bytes."""
    content = bytearray()
    with open_regular(path, follow=follow) as file:
        # Piece by piece: Python takes the memory of all that it is asked for, also where the file has less.
        while len(content) <= most and (piece := file.read(min(most + 1 - len(content), _PIECE))):
            content += piece
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
    return bytes(content)
