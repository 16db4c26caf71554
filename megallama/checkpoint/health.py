"""Which checkpoints a run saved while it was going well. A start continues those, and retention counts them."""

from __future__ import annotations

import shlex
from pathlib import Path

from megallama.checkpoint.format import (
    TornCheckpointError,
    complete_checkpoints,
    named_checkpoints,
    read_document,
    step_of,
)


def is_healthy(path: Path) -> bool:
    """Whether the state.json of a checkpoint says so; one that does not say, or is damaged, counts as healthy."""
    try:
        return read_document(path).get("healthy") is not False
    except TornCheckpointError:
        return True


def healthy_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under `folder` that are healthy, newest first."""
    return [path for path in complete_checkpoints(folder) if is_healthy(path)]


def candidates(folder: Path) -> list[Path]:
    """What is named as a checkpoint under `folder`, whole or not, in the order in which a start tries it.

    The newest first, those that are not healthy behind all others.
    """
    return sorted(named_checkpoints(folder), key=lambda path: not is_healthy(path))


def newer(path: Path) -> list[Path]:
    """What is named as a checkpoint beside the checkpoint `path` and is of a later step, newest first."""
    return [other for other in named_checkpoints(path.parent) if step_of(other) > step_of(path)]


def way_back(run_dir: Path, step: int) -> str:
    """The end of a sentence: how to go back to the newest healthy checkpoint before `step`."""
    found = [path for path in healthy_checkpoints(run_dir / "checkpoints") if step_of(path) < step]
    if not found:
        return f"no healthy checkpoint is before step {step}: start over with checkpoint.resume=never (deletes nothing)"
    command = f"megallama checkpoint rollback {shlex.quote(str(run_dir))} {step_of(found[0])}"
    return f"the newest healthy checkpoint is {found[0]}: go back to it with `{command}`"
