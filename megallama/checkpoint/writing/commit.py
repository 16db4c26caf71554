"""From files in a partial folder to a checkpoint that exists, and which older ones go. Rank 0's writer runs this.

A checkpoint exists from the rename of its folder on: everything in it, the manifest last, has reached the disk before.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megallama.checkpoint.format import (
    BEST,
    LATEST,
    STATE,
    File,
    Manifest,
    TornCheckpointError,
    complete_checkpoints,
    damaged_files,
    folder_name,
    named_checkpoints,
    named_step,
    read_manifest,
    step_of,
    why_torn,
    write_bytes,
    write_json,
    write_manifest,
)
from megallama.checkpoint.health import is_healthy
from megallama.checkpoint.state import read_saved
from megallama.errors import UserError
from megallama.system.on_disk import sync_folder

PARTIAL, DROPPED, TORN, UNDONE = "partial", "dropped", "torn", "undone"
"""What follows a checkpoint's name and a dot: being written, being deleted, not whole, undone by a return."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep` healthy ones, all at multiples of `keep_every`, and the best."""

    keep: int
    keep_every: int = 0
    """0 for none."""


def commit(
    unfinished: Path,
    final: Path,
    written: Mapping[str, File],
    documents: Mapping[str, object],
    saved: float,
    versions: dict[str, str],
) -> list[str]:
    """Make the files `written` into `unfinished`, and JSON files of `documents`, the checkpoint `final`.

    What stands there, as a checkpoint that was renamed, is moved out of the way: nothing is overwritten. Returns a
    sentence if there was. OSError if that fails, or if this node does not see what another has written.
    """
    for name, file in written.items():
        if (unfinished / name).stat().st_size != file.bytes:  # or it is not there: the nodes do not share the folder
            raise OSError(errno.EIO, os.strerror(errno.EIO), unfinished / name)
    files = dict(written) | {name: write_json(unfinished / name, value) for name, value in documents.items()}
    write_manifest(unfinished, Manifest(named_step(final), saved, versions, files))
    sync_folder(unfinished)
    moved = make_way(final)
    unfinished.rename(final)
    sync_folder(final.parent)
    return moved


def make_way(name: Path) -> list[str]:
    """Move what stands at `name`: a whole checkpoint to the name of its own step where that is free, else aside.

    Returns a sentence if there was anything.
    """
    if not os.path.lexists(name):
        return []
    try:
        torn = why_torn(name) is not None
    except UserError:  # of a newer format, which is left as it is
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
    own = name.with_name(folder_name(step_of(name)))
    if torn or os.path.lexists(own):
        own = set_aside(name, TORN if torn else UNDONE)
    else:
        name.rename(own)
    return [f"{name.name} was in the way of the checkpoint of that step, and is {own.name} now"]


def point(pointer: Path, name: str) -> None:
    """Write the name of a checkpoint into a file, which holds the old name or the new one at every moment."""
    new = pointer.with_name(f".{pointer.name}.{PARTIAL}")
    write_bytes(new, name.encode())
    new.replace(pointer)
    sync_folder(pointer.parent)


def apply_retention(folder: Path, retention: Retention, *, proven: bool = True) -> list[str]:
    """Point at the newest healthy checkpoint and the best, and delete what `retention` does not keep.

    The newest healthy one takes the place of an older one once it is `proven`: the run has trained on from it. What is
    not healthy stays while it is the newest of all. Returns what could not be done, a reason each: none of it harms a
    checkpoint. The newest stays whatever is asked.
    """
    try:
        found = complete_checkpoints(folder)
    except UserError as error:  # one of a newer format: what may go is not known
        return [str(error)]
    if not found:
        return []
    healthy = [path for path in found if is_healthy(path)]
    best = best_of(healthy)
    failures = repoint(folder, (healthy or found)[0], best)
    counted = healthy if proven else healthy[1:]
    stay = {found[0], *healthy[:1], *counted[: retention.keep], best}
    for old in found:
        permanent = retention.keep_every > 0 and step_of(old) % retention.keep_every == 0
        if not permanent and old not in stay:
            failures += _tried(partial(delete, old), old)
    return failures


def repoint(folder: Path, latest: Path, best: Path | None) -> list[str]:
    """Write both pointers, or delete the one to the best where there is none. Returns what could not be done."""
    to_best = folder / BEST
    done = partial(to_best.unlink, missing_ok=True) if best is None else partial(point, to_best, best.name)
    return _tried(partial(point, folder / LATEST, latest.name), folder / LATEST) + _tried(done, to_best)


def delete(path: Path) -> None:
    """Delete a checkpoint. It has another name from the first moment on: half of one is never taken for a whole."""
    doomed = path.with_name(f"{path.name}.{DROPPED}")
    path.rename(doomed)
    _remove(doomed)


def _remove(doomed: Path) -> None:
    """Remove a folder, or the link in its place: what that leads to may be another run's."""
    if doomed.is_symlink():
        doomed.unlink()
    else:
        shutil.rmtree(doomed)


def _tried(action: Callable[[], None], path: Path) -> list[str]:
    try:
        action()
    except OSError as error:
        return [f"{error.filename or path}: {error.strerror or error}"]
    return []


def best_of(checkpoints: list[Path]) -> Path | None:
    """The one of the lowest validation loss, of those that know theirs and whose state is not damaged."""
    losses = {path: _validation_loss(path) for path in checkpoints}
    known = {path: loss for path, loss in losses.items() if loss is not None}
    return min(known, key=lambda path: known[path], default=None)


def _validation_loss(path: Path) -> float | None:
    # A damaged checkpoint of long ago must not end the saves of today, nor be the best of all by a flipped bit.
    try:
        if damaged_files(path, read_manifest(path), [STATE]):
            return None
        return read_saved(path).state.validation_loss
    except TornCheckpointError:
        return None


def quarantine(folder: Path, damaged: Mapping[Path, str]) -> Iterator[str]:
    """After a run that ended anyhow: set aside what it was writing and what is torn, finish what it was deleting.

    Checkpoints that were found `damaged`, for the reason beside each, are set aside too. Says what it did, a sentence
    each.
    """
    for path, why in damaged.items():
        yield f"passed over {path.name}: {why}; set aside as {set_aside(path).name}"
    for path in sorted(folder.glob(f"step_*.{PARTIAL}-*")):
        yield f"{path.name} was never finished; set aside as {set_aside(path).name}"
    for path in named_checkpoints(folder):
        if (reason := why_torn(path)) is not None:
            yield f"{path.name} is not whole: {reason}; set aside as {set_aside(path).name}"
    for path in sorted(folder.glob(f"step_*.{DROPPED}")):
        left = _tried(partial(_remove, path), path)
        yield f"{path.name} cannot be deleted ({left[0]})" if left else f"{path.name} is deleted now"


def set_aside(path: Path, word: str = TORN) -> Path:
    """Rename a folder, so that nothing takes it for a checkpoint or collides with it."""
    name, number = path.name.split(".")[0], 1
    while (aside := path.with_name(f"{name}.{word}-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside
