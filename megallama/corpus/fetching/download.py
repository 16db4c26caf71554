"""One file over HTTP, whatever the network does: continued after every cut, and checked before it has its name.

What has arrived is in FILE.part, beside FILE.part.json, which says of which file it is a part. A server that can send
the rest is asked for the rest, in this command or in the next; one that cannot, or whose file has changed, sends all
of it again. RFC 9110, sections 13 and 14.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from email.message import Message
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from megallama.errors import UserError
from megallama.system.whole_file import put

TRIES = 6
"""In a row that bring a download no further; then it has failed."""
FIRST_WAIT = 0.25
"""Seconds; it doubles with every try in vain."""
SILENT_SECONDS = 60.0
_LONGEST_WAIT = 60.0
_CHUNK = 1 << 20
_BUSY = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Digest:
    """What the content of a file must hash to."""

    kind: str
    """`sha256`, or `git`: the SHA-1 of a git blob, which the hub has of small files."""
    value: str


@dataclass(frozen=True)
class Wanted:
    """A file to fetch."""

    url: str
    name: str
    """Its path below the output folder."""
    size: int | None = None
    digest: Digest | None = None
    authorization: str | None = None
    """For the host of the URL; other hosts that it leads to do not get it."""
    cached: Path | None = None
    """Where it is on this disk already."""


@dataclass(frozen=True)
class Version:
    """What a server says of the state of a file."""

    url: str
    size: int | None
    etag: str | None
    modified: str | None


class _CutError(Exception):
    """A try that ended before the file did, for a reason that may pass."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


Told = Callable[[int, int | None], None]
"""Called with the bytes that are there and those of the whole file, None where the server does not say."""


def checked(path: Path, digest: Digest | None) -> str | None:
    """The SHA-256 of a file; None if it has not the digest."""
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    hashes = [sha256, git] if digest and digest.kind == "git" else [sha256]
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for each in hashes:
                each.update(chunk)
    return sha256.hexdigest() if digest is None or hashes[-1].hexdigest() == digest.value else None


def download(wanted: Wanted, target: Path, told: Told) -> str:
    """Bring a file to `target`; returns its SHA-256.

    UserError if the server refuses, cannot be reached TRIES times in a row, or sends another content than it, or
    `wanted`, promises; OSError if the disk refuses. What has arrived stays for the next try.
    """
    part = _Part(target, wanted)
    began_at = part.offset
    in_vain, furthest = 0, part.offset
    while not part.whole:
        try:
            part.receive(told)
        except _CutError as cut:
            in_vain = 0 if part.offset > furthest else in_vain + 1
            furthest = max(furthest, part.offset)
            if in_vain == TRIES:
                raise UserError(_given_up(wanted, part, cut)) from None
            time.sleep(max(cut.wait, FIRST_WAIT * 2**in_vain if in_vain else 0.0))
    if sha256 := checked(part.path, wanted.digest):
        part.finish()
        return sha256
    part.drop()
    if began_at:  # what an earlier command left may have been of another file
        return download(wanted, target, told)
    assert wanted.digest is not None
    raise UserError(
        f"{wanted.url} arrived with another {wanted.digest.kind} hash than {wanted.digest.value}: it is damaged or not "
        "the file that is meant; it was removed, repeat the command or check the hash"
    )


class _Part:
    """What has arrived of a file."""

    def __init__(self, target: Path, wanted: Wanted) -> None:
        self._target, self._wanted = target, wanted
        self.path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")
        self._opener = urllib.request.build_opener(_Redirects)
        self._version = self._noted()
        self.whole = self._version is not None and self._version.size == self.offset

    @property
    def offset(self) -> int:
        """Bytes that are there."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def size(self) -> int | None:
        """Bytes of the whole file."""
        return self._version.size if self._version else self._wanted.size

    def drop(self) -> None:
        """Begin anew."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self._version, self.whole = None, False

    def finish(self) -> None:
        """Give the file its name."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        self.path.replace(self._target)
        self._note.unlink(missing_ok=True)

    def receive(self, told: Told) -> None:
        """One request for what is missing; sets `whole`, or raises _CutError."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "megallama"}
        if self._version and (offset := self.offset):
            headers["Range"] = f"bytes={offset}-"
        with self._answer(headers) as answer:
            version = _version(self._wanted.url, answer)
            self._check(version, answer.headers)
            if answer.status != 206:
                self._begin(version)
            elif not (self._is_rest(version) and _first_byte(answer.headers) == self.offset):
                self.drop()
                raise _CutError("the file changed at its source")
            self._read(answer, told)

    def _is_rest(self, version: Version) -> bool:
        """Whether an answer is of the state of which the part is, by the server, or by the hash at the end."""
        # Mirrors and caches name the same state in many ways; a hash does not depend on them.
        if self._version is not None and self._wanted.digest is not None:
            return version.size == self.size
        return version == self._version and (version.etag or version.modified) is not None

    def _answer(self, headers: dict[str, str]) -> Any:
        request = urllib.request.Request(self._wanted.url, headers=headers)
        if self._wanted.authorization:
            request.add_unredirected_header("Authorization", self._wanted.authorization)
        try:
            return self._opener.open(request, timeout=SILENT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise UserError(f"{self._wanted.url} has a certificate that is not trusted ({error.reason})") from None
            raise _CutError(_reason(error)) from None
        except (http.client.InvalidURL, ValueError) as error:
            raise UserError(f"{self._wanted.url} is no address ({error}); write other characters as %XX") from None
        except (OSError, http.client.HTTPException) as error:
            raise _CutError(_reason(error)) from None

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        if error.code == 416:  # the file ends before what is there does
            self.drop()
            return _CutError(f"it has fewer bytes than it promised ({error.headers.get('Content-Range', 'unknown')})")
        if error.code in _BUSY:
            asked = error.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdecimal() else 0.0
            return _CutError(f"HTTP {error.code} {error.reason}", min(wait, _LONGEST_WAIT))
        return UserError(_refusal(self._wanted.url, error.code, str(error.reason).partition("\n")[0]))

    def _check(self, version: Version, headers: Message) -> None:
        page = headers.get_content_type() == "text/html" and not self._target.name.endswith((".html", ".htm"))
        if page and self._wanted.digest is None:
            raise UserError(
                f"{self._wanted.url} answers with a web page, as a login or a proxy does; give the address of the file "
                "itself, or its hash: --sha256"
            )
        if version.size is None and self._wanted.digest is None:
            raise UserError(
                f"{self._wanted.url} comes without its size, so nobody can tell whether it is whole; give its hash: "
                "--sha256"
            )
        if self._wanted.size is not None and version.size not in (None, self._wanted.size):
            raise UserError(
                f"{self._wanted.url} promises {version.size:,} bytes, and its listing {self._wanted.size:,}: it "
                "changed a moment ago, or a proxy answers in its place; repeat the command"
            )

    def _begin(self, version: Version) -> None:
        """Start a part from its first byte. It is empty before its note changes: no part has another's note."""
        if version.size is not None and version.size > shutil.disk_usage(self.path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.path.write_bytes(b"")
        put(self._note, json.dumps(asdict(version)).encode())
        self._version = version

    def _read(self, answer: Any, told: Told) -> None:
        size = self.size
        with self.path.open("ab") as file:
            told(file.tell(), size)
            while chunk := _chunk(answer):
                file.write(chunk)
                told(file.tell(), size)
            self.whole = size is None or file.tell() == size
        if not self.whole:
            raise _CutError("the connection was closed")

    def _noted(self) -> Version | None:
        """The state of which the part is, None if there is no part that can be continued."""
        try:
            version = Version(**json.loads(self._note.read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):  # a crash of the machine may have damaged it
            return None
        size = version.size
        if version.url != self._wanted.url or not isinstance(size, int) or not 0 < self.offset <= size:
            return None
        return version


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirections, with what authorizes the request where they stay on its host; none that gives HTTPS up."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        here, there = urlsplit(req.full_url), urlsplit(newurl)
        if there.scheme not in (here.scheme, "https"):
            raise urllib.error.HTTPError(newurl, code, f"it leads to {newurl}, by {there.scheme}", headers, fp)
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if new is not None and token and there[:2] == here[:2]:
            new.add_unredirected_header("Authorization", token)
        return new


def _chunk(answer: Any) -> bytes:
    try:
        return bytes(answer.read1(_CHUNK))
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(_reason(error)) from None


def _version(url: str, answer: Any) -> Version:
    """Of an answer of all (200) or of a part (206), whose length is that of the part."""
    told = answer.headers.get("Content-Length")
    if answer.status == 206:
        told = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return Version(url, _number(told), answer.headers.get("ETag"), answer.headers.get("Last-Modified"))


def _first_byte(headers: Message) -> int | None:
    return _number(headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0])


def _number(text: str | None) -> int | None:
    """None for what is no number of bytes that a disk may have."""
    return int(text) if text and text.isdecimal() and len(text) < 20 else None


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__


def _given_up(wanted: Wanted, part: _Part, cut: _CutError) -> str:
    there = f"after {part.offset:,} of {part.size:,} bytes" if part.size else "before the first byte"
    return (
        f"{wanted.url} cannot be fetched: {TRIES} tries in a row ended {there} ({cut}); check the network, then repeat "
        "the command, which continues"
    )


def _refusal(url: str, code: int, reason: str) -> str:
    if code in (401, 403):
        return f"{url} is not for everybody (HTTP {code} {reason}); ask its owner for access, or fetch another"
    if code in (404, 410):
        return f"{url} does not exist (HTTP {code} {reason}); check the address"
    return f"{url} cannot be fetched (HTTP {code} {reason}); check the address"
