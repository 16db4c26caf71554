"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megallama.errors import UserError, check_printable
from megallama.system.lock import beside, output_lock
from megallama.system.on_disk import sync_folder
from megallama.system.signals import end_in_order


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, beside `out`, which has its name once the block has ended and all is on the disk.

    Nothing is left where the block raises or a signal ends it. UserError if something stands at `out`, another command
    makes it, or the disk is full.
    """
    check_printable("OUT", str(out))
    _refuse_to_write_over(out)
    with end_in_order(), output_lock(beside(out), f"OUT {out}", "OUT") as lock:
        _refuse_to_write_over(out)
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed: this one has the lock
        try:
            partial.mkdir()
            yield partial
            _sync(partial)
            lock.check()
            partial.rename(out)
            sync_folder(out.parent)
        except OSError as error:
            where = f" at {error.filename}" if error.filename else ""
            raise UserError(
                f"{out} cannot be made ({error.strerror or error}{where}); mend that, or give another OUT"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_to_write_over(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"{out} exists, and is not written over; give another OUT, or remove it")


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync_folder(path)  # files as well: it opens, and waits for the disk
    sync_folder(folder)
