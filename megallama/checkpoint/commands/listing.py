"""What is in a folder of checkpoints: those that are whole, and what is left of others. Reads names, sizes and JSON."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megallama.checkpoint.format import (
    BEST,
    LATEST,
    MANIFEST,
    TornCheckpointError,
    complete_checkpoints,
    named_checkpoints,
    read_document,
    read_manifest,
    step_of,
)
from megallama.checkpoint.health import healthy_checkpoints, is_healthy
from megallama.checkpoint.writing.commit import DROPPED, PARTIAL, TORN, UNDONE
from megallama.errors import UserError
from megallama.layout.names import Layout

COMPLETE = "complete"
_NAME = re.compile(rf"step_([0-9]{{8,15}})(?:\.({PARTIAL}|{TORN}|{UNDONE}|{DROPPED})(?:-.*)?)?")
_LEFT_OVER = {PARTIAL: "unfinished", TORN: "set aside", UNDONE: "undone", DROPPED: "half deleted"}


@dataclass(frozen=True)
class Entry:
    """A folder that is named as a checkpoint or as what is left of one; None for what it does not say."""

    path: Path
    step: int
    condition: str
    """COMPLETE as far as names and sizes tell, or what it is instead."""
    marks: tuple[str, ...]
    """`latest`, `best`, `unhealthy`."""
    bytes: int
    """The size of the files that are there."""
    saved: float | None
    """Seconds since 1970."""
    loss: float | None
    validation_loss: float | None
    layout: str | None


def checkpoints_folder(path: Path) -> Path:
    """The folder of checkpoints of a run directory, or `path` if it is one. UserError if it is neither."""
    if (path / "checkpoints").is_dir():
        return path / "checkpoints"
    if path.is_dir() and any(_NAME.fullmatch(found.name) for found in path.iterdir()):
        return path
    reason = "holds no checkpoint" if path.is_dir() else "is not a folder"
    raise UserError(f"{path} {reason}; give a run directory such as runs/quickstart")


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint `path`, whole or not, or all that its run has, newest first. UserError if there is none."""
    if is_one(path):
        return [path]
    folder = checkpoints_folder(path)
    found = named_checkpoints(folder)
    if not found:
        raise UserError(f"{folder} holds no checkpoint; train until the first save")
    return found


def checkpoint_at(path: Path) -> tuple[Path, Path]:
    """The checkpoint that `path` means, and the run directory that it is in, whether or not there is one around it.

    `path` is a checkpoint, whole or not, or a link to one; or a run directory or its folder of checkpoints, of which
    the newest healthy one is meant, else the newest. UserError if there is none.
    """
    if is_one(path):
        return path, path.resolve().parent.parent
    folder = checkpoints_folder(path)
    found = healthy_checkpoints(folder) or complete_checkpoints(folder)
    if not found:
        raise UserError(f"{path} holds no checkpoint yet; train until the first save")
    return found[0], path.resolve().parent if folder == path else path.absolute()


def is_one(path: Path) -> bool:
    """Whether `path` is a folder with the name of a checkpoint or of what is left of one, or with a manifest."""
    return path.is_dir() and (bool(_NAME.fullmatch(path.name)) or (path / MANIFEST).is_file())


def entries(folder: Path) -> list[Entry]:
    """Everything in a folder of checkpoints, newest first."""
    marked = pointers(folder)
    found = []
    for path in folder.iterdir():
        if path.is_dir() and _NAME.fullmatch(path.name):
            # A run that is alive renames and deletes meanwhile.
            with suppress(FileNotFoundError):
                found.append(_entry(path, marked))
    return sorted(found, key=lambda entry: (-entry.step, entry.path.name))


def pointers(folder: Path) -> dict[str, str]:
    """The names in `latest` and `best`, of those that are there."""
    found = {name: folder / name for name in (LATEST, BEST)}
    return {name: path.read_text(errors="replace") for name, path in found.items() if path.is_file()}


def layout_name(layout: dict[str, Any]) -> str:
    """The layout in a state.json, as `tp2-pp4-dualpipev-dp8-zero1, bf16`."""
    spread = Layout(
        tp=layout["tensor"],
        pp=layout["pipeline"],
        dp=layout["data"],
        cp=layout.get("context", 1),  # a checkpoint of before context parallelism says nothing of it
        context_mode=layout.get("context_mode", "gather"),
        schedule=layout["schedule"],
        zero=layout["zero_stage"],
    )
    return f"{spread.name}, {layout['dtype']}"


def _entry(path: Path, marked: dict[str, str]) -> Entry:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    condition, saved = _condition(path)
    loss, validation_loss, layout = _facts(path)
    return Entry(
        path=path,
        step=int(match[1]) if match[2] else step_of(path),
        condition=_LEFT_OVER.get(match[2], condition),
        marks=(*(pointer for pointer, name in marked.items() if name == path.name), *_health(path)),
        bytes=sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        saved=saved,
        loss=loss,
        validation_loss=validation_loss,
        layout=layout,
    )


def _health(path: Path) -> list[str]:
    return [] if is_healthy(path) else ["unhealthy"]


def _condition(path: Path) -> tuple[str, float | None]:
    """What a folder is, by its manifest, and when it was saved if it is whole."""
    try:
        return COMPLETE, read_manifest(path).saved
    except TornCheckpointError as error:
        return f"torn: {error}", None
    except UserError:
        return "of a newer format", None


def _facts(path: Path) -> tuple[float | None, float | None, str | None]:
    """Training loss, validation loss and layout; None where state.json does not say, for it may be damaged."""
    try:
        document = read_document(path)
        loss, validation_loss = document["loss"], document["state"]["validation_loss"]
        return _number(loss), _number(validation_loss), layout_name(document["layout"])
    except (TornCheckpointError, ValueError, KeyError, TypeError, OverflowError):
        return None, None, None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
