"""The launcher above a rank: whether it is still there.

A signal to the `deepspeed` command, or one that torchrun does not handle, ends that command alone: its ranks train on
with nobody to start or stop them. They notice by their ancestors.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import psutil

_COMMANDS = {"torchrun", "deepspeed", "torch.distributed.run", "deepspeed.launcher.launch", "deepspeed.launcher.runner"}


class Ancestors:
    """The processes of the launcher above this one, as they are when this is made."""

    def __init__(self) -> None:
        self._launchers = list(takewhile(_is_launcher, psutil.Process().parents()))

    @property
    def found(self) -> bool:
        """Whether there was one."""
        return bool(self._launchers)

    def gone(self) -> bool:
        """Whether one of them has ended since: its children have another parent from then on."""
        process: psutil.Process | None = psutil.Process()
        for launcher in self._launchers:
            process = process.parent() if process else None
            if process != launcher:
                return True
        return False


def _is_launcher(process: psutil.Process) -> bool:
    """Whether the process was started as torchrun or deepspeed: behind the interpreter and its options."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return any(Path(word).name in _COMMANDS for word in words[:4])
