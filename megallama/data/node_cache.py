"""Datasets behind URLs: one copy on each node, which its ranks then map into memory as any other dataset.

A copy is in the cache folder under a name that depends on the URL and on the state of the files behind it, so a dataset
that was replaced is another copy. A file has its name once it is whole.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megallama.errors import UserError
from megallama.system.lock import Lock, Place
from megallama.system.remote import RemoteFile, is_url, remote_exists, remote_file

CACHE = "MEGALLAMA_CACHE"
_PIECE = 16 << 20
_AT_A_TIME = 8
"""Pieces that are under way: a storage sends each no faster than some 100 MB/s."""


def cache_folder() -> Path:
    """Where a node keeps what it has copied: MEGALLAMA_CACHE, or `megallama` in the user's cache folder.

    UserError if the user has none.
    """
    if named := os.environ.get(CACHE):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megallama"
    except RuntimeError:  # a user of a container need not be one of its system
        raise UserError(f"no folder for what is copied to this node: HOME is not set; set {CACHE} to one") from None


def on_this_node(prefix: str) -> str:
    """The prefix of a dataset on a disk of this node: `prefix` itself, or that of a copy if it is a URL.

    The first process of a node copies, the others wait for it; a copy that was stopped is continued. UserError if the
    dataset does not exist, its storage cannot be read, or the disk of the cache is too small.
    """
    if not is_url(prefix):
        return prefix
    try:
        files = _remote_files(prefix)
    except OSError as error:
        raise _unreadable(prefix, error) from None
    key = hashlib.sha256("\n".join(f"{file.url}\0{file.size}\0{file.state}" for file in files).encode()).hexdigest()
    folder = cache_folder() / "datasets" / key[:32]
    try:
        if _missing(files, folder):
            _copy_all(prefix, files, folder)
    except OSError as error:
        raise _unreadable(prefix, error) from None
    return str((folder / files[-1].name).with_suffix(""))


def is_remote_dataset(prefix: str) -> bool:
    """Whether it is the URL of a dataset. UserError if its storage cannot be read."""
    try:
        return is_url(prefix) and remote_exists(f"{prefix}.idx")
    except OSError as error:
        raise _unreadable(prefix, error) from None


def _remote_files(prefix: str) -> list[RemoteFile]:
    """PREFIX.json if there is one, PREFIX.bin, PREFIX.idx; in the order in which they are copied."""
    found: list[RemoteFile] = []
    for suffix in (".json", ".bin", ".idx"):
        try:
            found.append(remote_file(prefix + suffix))
        except FileNotFoundError:
            if suffix != ".json":  # a dataset made elsewhere has none
                raise UserError(
                    f"{prefix}{suffix} does not exist; name a dataset there, or build one with "
                    f"`megallama data build SOURCE --output {prefix}`"
                ) from None
    return found


def _copy_all(prefix: str, files: list[RemoteFile], folder: Path) -> None:
    place = Place(f"the copy of {prefix} in {folder}", "wait until it has ended", f"set {CACHE} to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / "lock", place, handover_seconds=math.inf):
        missing = _missing(files, folder)
        _check_space(prefix, missing, folder)
        if missing:
            size = sum(file.size for file in missing) / 1e9
            print(f"megallama: copying {prefix}, {size:,.2f} GB, to {folder}", file=sys.stderr, flush=True)
        for file in missing:
            _copy(file, folder / file.name)


def _missing(files: list[RemoteFile], folder: Path) -> list[RemoteFile]:
    """Those that are not there whole: a purge of old files, or a disk, may have taken some."""
    return [file for file in files if not (there := folder / file.name).exists() or there.stat().st_size != file.size]


def _check_space(prefix: str, missing: list[RemoteFile], folder: Path) -> None:
    partials = [_partial(folder / file.name) for file in missing]
    there = sum(partial.stat().st_size for partial in partials if partial.exists())
    needed, free = sum(file.size for file in missing) - there, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the copy of {prefix} on this node needs {needed / 1e9:,.2f} GB, and {cache_folder()} has "
            f"{free / 1e9:,.2f} GB free; remove old datasets from it, or set {CACHE} to a folder on a larger disk"
        )


def _copy(file: RemoteFile, target: Path) -> None:
    """Copy a file, from where a copy that was stopped has ended; it has its own name once it is whole."""
    partial = _partial(target)
    with partial.open("ab") as copy, ThreadPoolExecutor(_AT_A_TIME) as pool:
        row = _PIECE * _AT_A_TIME
        for begin in range(copy.tell(), file.size, row):
            starts = range(begin, min(begin + row, file.size), _PIECE)
            for piece in pool.map(lambda start: file.read(start, start + _PIECE), starts):
                copy.write(piece)
        copy.flush()
        os.fsync(copy.fileno())
        size = copy.tell()
    if size != file.size or remote_file(file.url) != file:
        partial.unlink()
        raise UserError(f"{file.url} was replaced while it was copied; repeat the command once it stands")
    partial.replace(target)


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _unreadable(prefix: str, error: OSError) -> UserError:
    where = f"{error.filename}: " if error.filename else ""
    return UserError(
        f"the dataset {prefix} cannot be copied to this node ({where}{error.strerror}); mend that and repeat the "
        f"command, which continues, or name a dataset on a disk"
    )
