"""What a checkpoint is on disk, format 1: which folders are one, and whether one is whole. Knows files, not tensors.

The format is written down for other programs in docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megallama.errors import UserError
from megallama.system.on_disk import write_on_disk
from megallama.system.regular_file import open_regular, read_regular

FORMAT = 1
MANIFEST = "manifest.json"
TENSORS = "tensors.json"
STATE = "state.json"
LATEST = "latest"
BEST = "best"
_NAME = re.compile(r"step_[0-9]{8,15}")
NUMBERS = re.compile(r"rank_[0-9]{5,9}\.bin")
"""Names of the files that hold numbers."""
LARGEST = 1 << 53
"""The largest integer in a checkpoint: up to here every reader of JSON has them exactly."""
Count = Annotated[int, Field(ge=0, lt=LARGEST)]
_YEAR_9000 = 2.2e11
LARGEST_STATE = 1 << 24
"""Bytes; a state has seven kilobytes, half a MiB more with the longest `health.window`, and the sources of a mixture.

They come from a configuration, which has a MiB at most, and is here without its short forms.
"""
_LARGEST_MANIFEST = 1 << 27
"""Bytes: a million files."""
_PIECE = 1 << 24
"""Bytes read at once."""


class TornCheckpointError(Exception):
    """A folder named as a checkpoint that is not a whole one; the message says why."""


@dataclass(frozen=True)
class File:
    """What a file of a checkpoint must be."""

    bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Manifest:
    """The last file that is written into a checkpoint: what all others must be."""

    step: Count
    saved: Annotated[float, Field(ge=0, lt=_YEAR_9000)]
    """Seconds since 1970."""
    versions: dict[str, str]
    files: dict[str, File]

    @property
    def bytes(self) -> int:
        """The size of all files but the manifest."""
        return sum(file.bytes for file in self.files.values())


_CONTENT = TypeAdapter(Manifest)


def folder_name(step: int) -> str:
    """The name of the checkpoint after `step`."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint: what its manifest says or, without a legal one, its name. Folders may be renamed."""
    try:
        return _read_content(path).step
    except (TornCheckpointError, UserError):
        return named_step(path)


def named_step(path: Path) -> int:
    """The step that the name of a checkpoint says."""
    return int(path.name.removeprefix("step_"))


def holds(path: Path, step: int, saved: float) -> bool:
    """Whether what stands at `path` is the whole checkpoint of `step` that was saved at that time."""
    try:
        found = read_manifest(path)
    except (TornCheckpointError, UserError):
        return False
    return (found.step, found.saved) == (step, saved)


def named_checkpoints(folder: Path) -> list[Path]:
    """What is named as a checkpoint under `folder`, whole or not: the newest first, of one step its own name first."""
    steps = {path: step_of(path) for path in folder.glob("step_*") if _NAME.fullmatch(path.name)}
    return sorted(steps, key=lambda path: (-steps[path], path.name != folder_name(steps[path]), path.name))


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

    TornCheckpointError if it is missing or damaged, or a file is missing, no file of a checkpoint, or of another size.
    UserError for a format that this version does not know.
    """
    manifest = _read_content(path)
    for name in (TENSORS, STATE):
        if name not in manifest.files:
            raise TornCheckpointError(f"{MANIFEST} names no {name}")
    for name, file in manifest.files.items():
        if Path(name).name != name:
            raise TornCheckpointError(f"{MANIFEST} names the file {name!r:.80} outside the folder")
        if name not in (TENSORS, STATE) and not NUMBERS.fullmatch(name):
            raise TornCheckpointError(f"{MANIFEST} names the file {name!r:.80}, which is none of a checkpoint")
        try:
            found = (path / name).lstat()
        except OSError:
            raise TornCheckpointError(f"{name} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise TornCheckpointError(f"{name} is no regular file")
        if found.st_size != file.bytes:
            raise TornCheckpointError(f"{name} has {found.st_size} bytes, not {file.bytes}")
    return manifest


def _read_content(path: Path) -> Manifest:
    """What the manifest of `path` says of itself. TornCheckpointError and UserError as `read_manifest`."""
    try:
        tree = json.loads(read_regular(path / MANIFEST, _LARGEST_MANIFEST, follow=False))
        number, content, sha256 = tree["format"], tree["content"], tree["sha256"]
        sealed = sha256 == _hash_of(content)
    except FileNotFoundError:
        raise TornCheckpointError(f"it has no {MANIFEST}") from None
    except OSError as error:
        raise TornCheckpointError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TornCheckpointError(f"{MANIFEST} is damaged") from None
    if type(number) is int and number > FORMAT:
        raise UserError(
            f"{path} is a checkpoint of format {number}, and this megallama reads up to {FORMAT}; use a newer megallama"
        )
    if type(number) is not int or number != FORMAT or not sealed:
        raise TornCheckpointError(f"{MANIFEST} is damaged")
    try:
        return _CONTENT.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise malformed(MANIFEST, error) from None


def plain(text: str) -> str:
    """A word of a checkpoint as it may stand in a sentence: on one line, without escape sequences, not too long."""
    return text if text.isprintable() and len(text) <= 120 else f"{text!r:.120}"


def malformed(name: str, error: ValidationError) -> TornCheckpointError:
    """What to raise where the JSON of a file is not what it should be."""
    first = error.errors()[0]
    place = plain(".".join(map(str, first["loc"])))
    found = f"{place} is {first['input']!r:.60}: " if place else ""
    return TornCheckpointError(f"{name} is malformed: {found}{first['msg']}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into `folder`, to the disk."""
    content = asdict(manifest)
    write_json(folder / MANIFEST, {"format": FORMAT, "content": content, "sha256": _hash_of(content)})


def read_document(path: Path) -> dict[str, Any]:
    """What the state.json of a checkpoint holds. TornCheckpointError if it is no JSON object."""
    try:
        document = json.loads(read_regular(path / STATE, LARGEST_STATE, follow=False))
    except OSError as error:
        raise TornCheckpointError(f"{STATE} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise TornCheckpointError(f"{STATE} is damaged") from None
    if not isinstance(document, dict):
        raise TornCheckpointError(f"{STATE} is damaged")
    return document


def damaged_files(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Read the files `names` whole; a reason for each whose content is not what was written."""
    return [f"{name} is damaged" for name in names if hash_file(path / name) != manifest.files[name].sha256]


def hash_file(path: Path) -> str | None:
    """SHA-256 of a file; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_regular(path, follow=False) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()


def write_json(path: Path, value: object) -> File:
    """Write, reach the disk before returning, and say what was written."""
    return write_bytes(path, json.dumps(value).encode())


def write_bytes(path: Path, content: bytes) -> File:
    """Write a new file, reach the disk before returning, and say what was written."""
    return File(len(content), write_on_disk(path, content))


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
