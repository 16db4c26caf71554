"""Ways in which a checkpoint goes bad."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megallama.checkpoint.format import (
    MANIFEST,
    STATE,
    TENSORS,
    File,
    Manifest,
    folder_name,
    hash_file,
    read_manifest,
    write_manifest,
)

FIXTURE = Path(__file__).parent / "fixtures" / "format-1"
CHECKPOINT = FIXTURE / "step_00000003"
EMBEDDING = "model.embed_tokens.weight"
Harm = Callable[[Path], object]


class Bomb:
    """Leaves the file `exploded` where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('exploded').write_text('')",))


def plant(path: Path) -> None:
    """Put a pickle in the place of a file of a checkpoint, of the same size, and its hash in the manifest."""
    rewrite(path, pickle.dumps(Bomb()).ljust(path.stat().st_size, b"."))


def flip(path: Path, at: int | None = None) -> None:
    """Flip one bit of a file, in the middle if not told where."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Cut off the last byte of a file."""
    path.write_bytes(path.read_bytes()[:-1])


def bomb(path: Path) -> None:
    """Put a pickle in the place of a file, of the same size where there is room."""
    path.write_bytes(pickle.dumps(Bomb()).ljust(path.stat().st_size, b"."))


def rewrite(path: Path, content: bytes) -> None:
    """Replace a file of a checkpoint, and its hash in the manifest: now the content alone can be wrong."""
    manifest = read_manifest(path.parent)
    path.write_bytes(content)
    digest = hash_file(path)
    assert digest is not None
    files = manifest.files | {path.name: File(len(content), digest)}
    write_manifest(path.parent, Manifest(manifest.step, manifest.saved, manifest.versions, files))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the JSON of a file of a checkpoint, in place, and its hash in the manifest."""
    content = json.loads(path.read_bytes())
    change(content)
    rewrite(path, json.dumps(content).encode())


def edit_manifest(checkpoint: Path, change: Callable[[Any], object]) -> None:
    """Change the JSON of a manifest, in place, and not the hash in it."""
    content = json.loads((checkpoint / MANIFEST).read_bytes())
    change(content)
    (checkpoint / MANIFEST).write_text(json.dumps(content))


def copy_as(path: Path, step: int, folder: Path | None = None) -> Path:
    """Copy a checkpoint, beside itself or into `folder`, as that of a step in its name, its manifest and its state."""
    copy = shutil.copytree(path, (folder or path.parent) / folder_name(step))
    edit(copy / STATE, lambda content: content["state"].update(step=step, samples=4 * step, updates=step))
    manifest = read_manifest(copy)
    write_manifest(copy, Manifest(step, manifest.saved, manifest.versions, manifest.files))
    return copy


def put(*numbers: float, chunk: int = 1) -> Harm:
    """Put numbers in the place of the first in a chunk of the embedding: that of row 256, or that of all others."""

    def harm(path: Path) -> None:
        place = json.loads((path / TENSORS).read_bytes())["tensors"][EMBEDDING]["chunks"][chunk]
        content = bytearray((path / place["file"]).read_bytes())
        content[place["start"] : place["start"] + 4 * len(numbers)] = np.array(numbers, "<f4").tobytes()
        rewrite(path / place["file"], bytes(content))

    return harm
