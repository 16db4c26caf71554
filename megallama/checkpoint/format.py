"""What a checkpoint is on disk, format 1: which folders are one, and whether one is whole. Knows files, not tensors.

The format is written down for other programs in docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megallama.errors import UserError
from megallama.plan.budget import NOTHING_SEEN, Seen

if TYPE_CHECKING:
    from megallama.config.schema import RunConfig

FORMAT = 1
MANIFEST = "manifest.json"
TENSORS = "tensors.json"
STATE = "state.json"
LATEST = "latest"
BEST = "best"
_NAME = re.compile(r"step_(\d{8,})")
_PIECE = 1 << 24
"""Bytes read or written at once."""


class TornCheckpointError(Exception):
    """A folder named as a checkpoint that is not a whole one; the message says why."""


@dataclass(frozen=True)
class File:
    """What a file of a checkpoint must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The last file that is written into a checkpoint: what all others must be."""

    step: int
    saved: float
    """Seconds since 1970."""
    versions: dict[str, str]
    files: dict[str, File]

    @property
    def bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(file.bytes for file in self.files.values())


def folder_name(step: int) -> str:
    """The name of the checkpoint after `step`."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("step_"))


def named_checkpoints(folder: Path) -> list[Path]:
    """What is named as a checkpoint under `folder`, newest first, whole or not."""
    return sorted((path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder` whose manifest agrees with their files' sizes, newest first."""
    return [path for path in named_checkpoints(folder) if why_torn(path) is None]


def why_torn(path: Path) -> str | None:
    """Why `path` is not a whole checkpoint, as far as names and sizes tell, or None if it is one."""
    try:
        read_manifest(path)
    except TornCheckpointError as error:
        return str(error)
    return None


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`, its files looked at but not read.

    TornCheckpointError if it is missing or damaged, or a file is missing or of another size. UserError for a format
    that this version does not know.
    """
    try:
        tree = json.loads((path / MANIFEST).read_bytes())
        number, content, sha256 = tree["format"], tree["content"], tree["sha256"]
    except FileNotFoundError:
        raise TornCheckpointError(f"it has no {MANIFEST}") from None
    except OSError as error:
        raise TornCheckpointError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise TornCheckpointError(f"{MANIFEST} is damaged") from None
    if isinstance(number, int) and number > FORMAT:
        raise UserError(
            f"{path} is a checkpoint of format {number}, and this megallama reads up to {FORMAT}; use a newer megallama"
        )
    if number != FORMAT or sha256 != _hash_of(content):
        raise TornCheckpointError(f"{MANIFEST} is damaged")
    files = {name: File(**file) for name, file in content["files"].items()}
    for name in (TENSORS, STATE):
        if name not in files:
            raise TornCheckpointError(f"{MANIFEST} names no {name}")
    for name, file in files.items():
        if Path(name).name != name:
            raise TornCheckpointError(f"{MANIFEST} names the file {name!r} outside the folder")
        found = path / name
        if not found.is_file():
            raise TornCheckpointError(f"{name} is missing")
        if found.stat().st_size != file.bytes:
            raise TornCheckpointError(f"{name} has {found.stat().st_size} bytes, not {file.bytes}")
    return Manifest(content["step"], content["saved"], content["versions"], files)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into `folder`, to the disk."""
    content = asdict(manifest)
    write_json(folder / MANIFEST, {"format": FORMAT, "content": content, "sha256": _hash_of(content)})


def read_document(path: Path) -> dict[str, Any]:
    """What the state.json of a checkpoint holds. TornCheckpointError if it is no JSON object."""
    try:
        document = json.loads((path / STATE).read_bytes())
    except OSError as error:
        raise TornCheckpointError(f"{STATE} cannot be read: {error.strerror}") from None
    except ValueError:
        raise TornCheckpointError(f"{STATE} is damaged") from None
    if not isinstance(document, dict):
        raise TornCheckpointError(f"{STATE} is damaged")
    return document


def seen_before(config: RunConfig) -> Seen:
    """How far the run is that a start continues, as its newest checkpoint says: enough to check its length."""
    return NOTHING_SEEN if config.checkpoint.resume == "never" else newest_seen(Path(config.run.dir) / "checkpoints")


def newest_seen(folder: Path) -> Seen:
    """How far the newest whole checkpoint under `folder` is that says so in legal numbers; nothing without one."""
    for path in complete_checkpoints(folder):
        try:
            state = read_document(path)["state"]
            step, samples, first_batch = state["step"], state["samples"], state.get("first_batch")
        except (TornCheckpointError, RecursionError, KeyError, TypeError, AttributeError):
            continue
        if all(type(number) is int and number > 0 for number in (step, samples, first_batch or samples)):
            return Seen(step, samples, first_batch)
    return NOTHING_SEEN


def damaged_files(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Those of the files `names` whose content is not what was written: a reason each. Reads them whole."""
    return [f"{name} is damaged" for name in names if hash_file(path / name) != manifest.files[name].sha256]


def damage(path: Path) -> list[str]:
    """Everything that is wrong with the checkpoint at `path`, all of which is read; empty if nothing is."""
    try:
        manifest = read_manifest(path)
    except TornCheckpointError as error:
        return [str(error)]
    return damaged_files(path, manifest, sorted(manifest.files))


def hash_file(path: Path) -> str | None:
    """SHA-256 of a file; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()


def write_json(path: Path, value: object) -> File:
    """Write, reach the disk before returning, and say what was written."""
    return write_bytes(path, json.dumps(value).encode())


def write_bytes(path: Path, content: bytes | memoryview) -> File:
    """Write a new file in pieces, reach the disk before returning, and say what was written."""
    view, digest = memoryview(content), hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            digest.update(piece)
            while piece:
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return File(len(view), digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
