"""Files behind URLs of the schemes that fsspec knows: s3://, gs://, hf:// and others, where their package is installed.

A file is read by range requests of at most READ_AHEAD bytes, so memory stays bounded whatever its size. Every failure,
of whatever package, is an OSError, as of a file on a disk.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from megallama.errors import UserError
from megallama.system.regular_file import open_regular

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from fsspec import AbstractFileSystem

READ_AHEAD = 8 << 20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_STATES = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "updated", "mtime")
"""What file systems say of a file that changes with its content, the most telling first."""


def is_url(name: str) -> bool:
    """Whether it is SCHEME://..., and not the path of a file."""
    return _URL.match(name) is not None


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, as it was found; it goes wherever a `Path` of a source goes."""

    url: str
    size: int
    state: str
    """Another one when the content is another: an ETag, a hash or a time, as the storage has it."""

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        """As of a `Path`."""
        return PurePosixPath(self.url).suffix

    def __str__(self) -> str:
        return self.url

    def open(self) -> BinaryIO:
        """The content, seekable; it raises UserError where it cannot be read."""
        return cast(BinaryIO, io.BufferedReader(_Ranges(self), READ_AHEAD))

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end` or the end of the file; OSError if they do not come."""
        end = min(end, self.size)
        if end <= start:
            return b""
        system, path = _file_system(self.url)
        with _as_os_errors():
            content: bytes = system.cat_file(path, start=start, end=end)
        if len(content) != end - start:
            raise OSError(errno.EIO, f"the storage sent {len(content)} of {end - start} bytes of {self.url}")
        return content


SourcePath = Path | RemoteFile


def source_path(name: str) -> SourcePath:
    """A file by its path or URL; OSError and UserError as `remote_file`."""
    return remote_file(name) if is_url(name) else Path(name)


def open_source_file(path: SourcePath) -> BinaryIO:
    """A source, open to read and seek bytes; OSError if it cannot be read, or is no regular file."""
    return path.open() if isinstance(path, RemoteFile) else open_regular(path)


def source_state(path: SourcePath) -> tuple[int, str]:
    """Its size in bytes, and what changes with its content; OSError if it cannot be asked."""
    if isinstance(path, RemoteFile):
        return path.size, path.state
    found = path.stat()
    return found.st_size, str(found.st_mtime_ns)


def remote_file(url: str) -> RemoteFile:
    """The file behind a URL; FileNotFoundError if there is none, other OSErrors if the storage refuses.

    UserError for a scheme of no installed package.
    """
    system, path = _file_system(url)
    with _as_os_errors():
        system.invalidate_cache()
        return _described(system, system.info(path))


def remote_exists(url: str) -> bool:
    """Whether a file is behind a URL; OSError and UserError as `remote_file`."""
    try:
        remote_file(url)
    except FileNotFoundError:
        return False
    return True


def remote_files(url: str, suffixes: tuple[str, ...]) -> list[RemoteFile]:
    """The file behind a URL, or those below a folder or of a glob with one of the suffixes, ordered by URL.

    OSError and UserError as `remote_file`; an empty list where nothing is.
    """
    system, path = _file_system(url)
    with _as_os_errors():
        system.invalidate_cache()
        if any(character in path for character in "*?["):
            found = system.glob(path, detail=True)
        elif system.isfile(path):
            found = {path: system.info(path)}
        else:
            found = system.find(path, detail=True)
        files = [_described(system, info) for info in found.values() if info["type"] == "file"]
    return sorted((file for file in files if file.name.endswith(suffixes)), key=lambda file: file.url)


def remove_remote(url: str) -> None:
    """Remove the file behind a URL, if there is one; OSError if the storage refuses."""
    system, path = _file_system(url)
    with _as_os_errors():
        system.invalidate_cache()
        if system.exists(path):
            system.rm_file(path)


def upload(local: Path, url: str) -> None:
    """Put a file behind a URL; storages show it when it is whole. OSError if the storage refuses."""
    system, path = _file_system(url)
    with _as_os_errors():
        system.put_file(os.fspath(local), path)


class _Ranges(io.RawIOBase):
    """A remote file by range requests."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        return self._place

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        try:
            content = self._file.read(self._place, self._place + min(len(view), READ_AHEAD))
        except OSError as error:  # readers may take an OSError for a damaged file, which they leave out
            raise UserError(f"{self._file} cannot be read any further ({error.strerror}); repeat the command") from None
        view[: len(content)] = content
        self._place += len(content)
        return len(content)


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    import fsspec

    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        raise UserError(f"{url} must be on a disk before it is read; fetch it: megallama data fetch {url}")
    try:
        system, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{url} needs a package that is not installed ({_first_line(error)}); "
            "install it with: pip install 'megallama[remote]'"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{url} cannot be read ({_first_line(error)}); known are s3://, gs://, hf://, file://"
        ) from None
    except Exception as error:  # some connect at once, some need more than a URL
        raise OSError(errno.EIO, _first_line(error)) from error
    return system, path


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Every package for a storage has exceptions of its own, also for keys that are missing and hosts out of reach."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, _first_line(error)) from error
    except Exception as error:
        raise OSError(errno.EIO, _first_line(error)) from error


def _described(system: AbstractFileSystem, info: dict[str, Any]) -> RemoteFile:
    if info["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, "it is no file", info["name"])
    state = next((str(info[name]) for name in _STATES if info.get(name)), "")
    return RemoteFile(str(system.unstrip_protocol(info["name"])), int(info["size"]), state)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
