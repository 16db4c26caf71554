"""A real HTTP server on this machine that behaves as badly as it is told to."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """One file at every address, and how it is served."""

    content: bytes
    etag: str | None = '"one"'
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    """Bytes after which the next answers end; those behind them are whole."""
    promised: int | None = None
    """The size that is told in the place of the true one."""
    status: int = 200
    kind: str = "application/octet-stream"
    changes: list[tuple[bytes, str]] = field(default_factory=list)
    """Content and ETag after the next answers."""
    requests: list[str] = field(default_factory=list)
    """The Range of each request, empty for all."""
    headers: list[dict[str, str]] = field(default_factory=list)
    redirect: str | None = None
    gates: list[threading.Event] = field(default_factory=list)
    """The next answers stop halfway until theirs is set."""
    halfway: threading.Event = field(default_factory=threading.Event)
    url: str = ""


class Quiet:
    """What a handler that says nothing of its requests has."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server that answers by `handler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(served: Served) -> Iterator[Served]:
    """Serve it; its `url` is that of the server."""

    class Serving(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, served)

    with listening(Serving) as served.url:
        yield served


def answer(handler: BaseHTTPRequestHandler, served: Served) -> None:
    """One answer of a server of that file, as `served` says."""
    asked = handler.headers.get("Range", "")
    served.requests.append(asked)
    served.headers.append({name.lower(): value for name, value in handler.headers.items()})
    handler.close_connection = True
    if served.redirect:
        handler.send_response(302)
        handler.send_header("Location", served.redirect)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    if served.status >= 300:
        handler.send_error(served.status)
        return
    begin = _begin(handler, served, asked)
    promised = len(served.content) if served.promised is None else served.promised
    if begin is not None and begin >= len(served.content):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(served.content)}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    handler.send_response(served.status if begin is None else 206)
    handler.send_header("Content-Type", served.kind)
    if begin is not None:
        handler.send_header("Content-Range", f"bytes {begin}-{promised - 1}/{promised}")
    if served.etag:
        handler.send_header("ETag", served.etag)
    handler.send_header("Content-Length", str(promised - (begin or 0)))
    handler.end_headers()
    _send(handler, served, served.content[begin or 0 :])


def _begin(handler: BaseHTTPRequestHandler, served: Served, asked: str) -> int | None:
    """The first byte of a part, None where all is sent."""
    found = re.fullmatch(r"bytes=(\d+)-", asked)
    condition = handler.headers.get("If-Range")
    if not served.ranges or found is None or (condition is not None and condition != served.etag):
        return None
    return int(found.group(1))


def _send(handler: BaseHTTPRequestHandler, served: Served, body: bytes) -> None:
    end = served.cuts.pop(0) if served.cuts else len(body)
    if served.gates:
        gate = served.gates.pop(0)
        handler.wfile.write(body[: end // 2])
        handler.wfile.flush()
        served.halfway.set()
        gate.wait()
        body, end = body[end // 2 :], end - end // 2
    handler.wfile.write(body[:end])
    handler.wfile.flush()
    if served.changes:
        served.content, served.etag = served.changes.pop(0)
