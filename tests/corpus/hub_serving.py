"""A server in the shape of the Hugging Face hub: what its client asks of a dataset, and nothing more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.corpus.serving import Quiet, Served, answer, listening

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One dataset; its large files are behind a redirection, as on the hub."""

    repository: str
    large: dict[str, Served]
    small: dict[str, bytes] = field(default_factory=dict)
    token: str | None = None
    """What a request must bring, if it is not None."""
    gated: bool = False
    url: str = ""
    resolved: list[str] = field(default_factory=list)
    """The paths whose content was asked for."""

    def entries(self) -> list[dict[str, Any]]:
        """What a listing says of every file."""
        large = [
            _entry(path, served.content)
            | {"lfs": {"oid": _sha256(served.content), "size": len(served.content), "pointerSize": 134}}
            for path, served in self.large.items()
        ]
        return large + [_entry(path, content) for path, content in self.small.items()]


@contextmanager
def serving_hub(hub: Hub) -> Iterator[Hub]:
    """Serve it; its `url` is what HF_ENDPOINT must be."""

    class Serving(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _get(self, hub)

        def do_HEAD(self) -> None:
            _get(self, hub)

        def do_POST(self) -> None:
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            _json(self, [entry for path in asked for entry in _at(hub, path)])

    with listening(Serving) as hub.url:
        yield hub


def _get(handler: BaseHTTPRequestHandler, hub: Hub) -> None:
    path = unquote(urlsplit(handler.path).path)
    if path.startswith("/cdn/"):
        answer(handler, next(file for file in hub.large.values() if _sha256(file.content) == path[5:]))
        return
    api, files = f"/api/datasets/{hub.repository}/", f"/datasets/{hub.repository}/resolve/"
    path = path.replace("/tree/main", f"/tree/{COMMIT}").replace("/resolve/main/", f"/resolve/{COMMIT}/")
    if not f"{path}/".startswith((api, files)):
        _refuse(handler, 404, "RepoNotFound")
    elif hub.token is not None and handler.headers.get("Authorization") != f"Bearer {hub.token}":
        _refuse(handler, 403 if hub.gated else 401, "GatedRepo" if hub.gated else "RepoNotFound")
    elif f"{path}/" == api or path.startswith(f"{api}revision/"):
        known = f"{path}/" == api or path.rpartition("/")[2] in ("main", COMMIT)
        facts = {"id": hub.repository, "sha": COMMIT, "private": False, "tags": [], "siblings": []}
        _json(handler, facts) if known else _refuse(handler, 404, "RevisionNotFound")
    elif path.startswith(f"{api}tree/{COMMIT}"):
        folder = path.removeprefix(f"{api}tree/{COMMIT}").strip("/")
        below = [entry for entry in hub.entries() if not folder or entry["path"].startswith(f"{folder}/")]
        _json(handler, below) if below else _refuse(handler, 404, "EntryNotFound")
    elif path.startswith(f"{files}{COMMIT}/"):
        _resolve(handler, hub, path.removeprefix(f"{files}{COMMIT}/"))
    else:
        _refuse(handler, 404, "EntryNotFound")


def _resolve(handler: BaseHTTPRequestHandler, hub: Hub, path: str) -> None:
    """A small file itself; of a large one its hash, its size and where it is."""
    if handler.command == "GET":
        hub.resolved.append(path)
    body = hub.small.get(path, b"")
    handler.send_response(200 if path in hub.small else 302)
    handler.send_header("X-Repo-Commit", COMMIT)
    if path in hub.small:
        handler.send_header("ETag", f'"{_git(body)}"')
    else:
        sha256 = _sha256(hub.large[path].content)
        handler.send_header("X-Linked-ETag", f'"{sha256}"')
        handler.send_header("X-Linked-Size", str(len(hub.large[path].content)))
        # Another host, as on the hub: its client takes the headers of this answer as the last of its own host.
        handler.send_header("Location", f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{sha256}")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def _at(hub: Hub, path: str) -> list[dict[str, Any]]:
    """The file, or the folder, at a path."""
    entries = hub.entries()
    exact = [entry for entry in entries if entry["path"] == path]
    below = any(entry["path"].startswith(f"{path}/") for entry in entries)
    return exact or ([{"type": "directory", "path": path, "oid": COMMIT, "size": 0}] if below else [])


def _json(handler: BaseHTTPRequestHandler, content: Any) -> None:
    body = json.dumps(content).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _refuse(handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
    handler.send_response(status)
    handler.send_header("X-Error-Code", code)
    handler.send_header("X-Error-Message", code)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _git(content)}


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
