"""The launcher above a rank: whether it is still there.

A signal to the `deepspeed` command, or one that torchrun does not handle, ends that command alone: its ranks train on
with nobody to start or stop them. They notice by their ancestors, of which Linux tells.
"""

from __future__ import annotations

import os
from pathlib import Path

_COMMANDS = {"torchrun", "deepspeed", "torch.distributed.run", "deepspeed.launcher.launch", "deepspeed.launcher.runner"}


class Ancestors:
    """The processes of the launcher above this one, as they are when this is made."""

    def __init__(self) -> None:
        self._pids: list[int] = []
        pid = os.getppid()
        while _is_launcher(pid):
            self._pids.append(pid)
            pid = _parent_of(pid)

    @property
    def found(self) -> bool:
        """Whether there was one."""
        return bool(self._pids)

    def gone(self) -> bool:
        """Whether one of them has ended since."""
        below = os.getpid()
        for pid in self._pids:
            if _parent_of(below) != pid:
                return True
            below = pid
        return False


def _is_launcher(pid: int) -> bool:
    """Whether the process was started as torchrun or deepspeed: behind the interpreter and its options."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(Path(word).name in _COMMANDS for word in words[:4])


def _parent_of(pid: int) -> int:
    """0 if the process is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])
