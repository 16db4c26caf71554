"""A file as an array that is read where it is looked at, and that holds no file open.

numpy and Python's own `mmap` keep a file descriptor for each mapping, and a mixture of a thousand datasets would need
more of them than a process usually may have.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LIBC = ctypes.CDLL(None, use_errno=True)
_INTEGERS = ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
_MMAP = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *_INTEGERS, use_errno=True)(("mmap", _LIBC))
_MUNMAP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(("munmap", _LIBC))


def mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The whole file, read-only; bytes at its end that make up no element are left out. OSError if it cannot be.

    What is behind the array goes with the last array that looks at it.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:  # what Linux does not map
            return np.zeros(0, dtype)
        address = _MMAP(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    content = (ctypes.c_char * size).from_address(address)
    weakref.finalize(content, _MUNMAP, address, size).atexit = False
    array = np.frombuffer(memoryview(content), dtype, size // dtype.itemsize)
    array.flags.writeable = False
    return array
