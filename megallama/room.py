"""Whether a run directory can be made and holds a checkpoint: asked before a run begins. Imports no torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.plan.params import count_parameters

CHECKPOINT_BYTES = 12
"""Per parameter: weight and two moments in fp32."""
_DEEPEST = Path("checkpoints", ".partial-step_00000000", "tensors-00000-of-00000.bin")
"""About as long as what a run writes below its directory."""


def check_run_dir(config: RunConfig) -> None:
    """UserError where the run directory cannot be made or written to, or has no room for a checkpoint."""
    folder = Path(config.run.dir)
    try:
        there = _nearest(folder.absolute())
    except OSError as error:
        raise UserError(f"run.dir={folder} cannot be made ({error.strerror}); use another run.dir") from None
    if not there.is_dir():
        raise UserError(f"run.dir={folder} cannot be made: {there} is not a folder; use another run.dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={folder} cannot be written: {there} is read-only for this user; use another run.dir")
    free, needed = shutil.disk_usage(there).free, checkpoint_bytes(config)
    if free < needed:
        raise UserError(
            f"run.dir={folder} has {free / 1e9:.2f} GB of free disk, and a checkpoint takes {needed / 1e9:.2f} GB; "
            "free some, or use another run.dir"
        )


def checkpoint_bytes(config: RunConfig) -> int:
    """What one checkpoint takes, names and places of tensors left out."""
    return CHECKPOINT_BYTES * count_parameters(config.model).total


def _nearest(folder: Path) -> Path:
    """The folder or what stands in its way: the nearest above it that is there, be it a link that leads nowhere.

    OSError where no such path can be, or where what a run writes below it would have too long a name.
    """
    for path in (folder / _DEEPEST, *(folder / _DEEPEST).parents):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if path in (folder, *folder.parents):
            return path
    raise AssertionError("the root is there")
