"""What people, launchers and the clock ask of a run, and how its ranks agree on the step at which they follow.

Files are looked for by rank 0; in each step all ranks take the union.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh
from megallama.run_dir.outcome import STOP_FILE
from megallama.system.lock import RunLock
from megallama.system.signals import release_signals

SAVE_FILE = "SAVE"
REASONS = ("a signal", "the end of the launcher", f"the file {STOP_FILE}", "train.max_minutes")
_UNMEASURED_BYTES_PER_SECOND = 1e8
"""What a disk is taken to write until a save has shown better."""


@dataclass(frozen=True)
class StopDecision:
    """What all ranks do now."""

    stop: str | None = None
    """The reason to save and leave, or None to go on."""
    save: bool = False
    give_up: bool = False
    """A rank saw that going on is of no use."""
    lost: str | None = None
    """Why the run directory is not this run's any more: nothing may be written there. None while it is."""


class StopRequests:
    """Made once by each rank, in its main thread; `lock` is rank 0's, who holds it."""

    def __init__(
        self,
        run_dir: Path,
        lock: RunLock | None,
        mesh: ParallelMesh,
        max_minutes: float | None,
        save_bytes: int,
        launch: Launch,
    ) -> None:
        self._dir, self._lock, self._mesh, self._launch = run_dir, lock, mesh, launch
        self._deadline = None if max_minutes is None else time.monotonic() - _process_age() + 60 * max_minutes
        self._save_seconds, self._measured = save_bytes / _UNMEASURED_BYTES_PER_SECOND, False
        self._asked: float | None = None
        self._longest_round, self._longest_rest = 0.0, 0.0  # from wishes to wishes, and from them to the end of a step
        self._lost: str | None = None
        self._save = False
        self.stop: str | None = None
        """The first reason to save and leave that the ranks have agreed on."""
        if mesh.rank == 0:
            for name in (STOP_FILE, SAVE_FILE):
                _forget(run_dir / name)
        release_signals()

    def save_took(self, seconds: float) -> None:
        """A save took that long: train.max_minutes leaves time for the longest so far."""
        self._save_seconds = max(self._save_seconds, seconds) if self._measured else seconds
        self._measured = True

    def wishes(self, *, saving: bool, give_up: bool) -> list[bool]:
        """What this rank asks for, to be called once in each step; `decide` takes the union over all ranks.

        `saving`: a save is in flight, for which the last one would wait.
        """
        first, now = self._mesh.rank == 0, time.monotonic()
        if self._asked is not None:  # since then there was a step, and perhaps an evaluation and a copy for a save
            self._longest_round = max(self._longest_round, now - self._asked)
        self._asked = now
        self._lost = self._lock.lost() if self._lock is not None else None
        return [
            *self._stops(self._longest_round + self._longest_rest, saving),
            first and (self._dir / SAVE_FILE).exists(),
            give_up,
            self._lost is not None,
        ]

    def no_step(self) -> None:
        """What takes time from here to the next wishes is no step's: none that takes as long need be waited for."""
        self._asked = None

    def decide(self, asked: Sequence[bool]) -> StopDecision:
        """What all ranks do after a step, by the wishes of any; the same on each, all of which must call it."""
        if self._asked is not None:
            self._longest_rest = max(self._longest_rest, time.monotonic() - self._asked)
        *stops, save, give_up, any_lost = asked
        self._take(stops)
        self._save = save
        return StopDecision(self.stop, save, give_up, (self._lost or f"{self._dir} is gone") if any_lost else None)

    def answer_save(self) -> None:
        """Answer the file that asks for a save, if that was agreed on: until now the run may have gone back."""
        if self._mesh.rank == 0 and self._save:
            (self._dir / SAVE_FILE).unlink(missing_ok=True)

    def came(self, *, saving: bool) -> str | None:
        """The reason for which what can wait is to be left out now, None to go on with it; not one agreed on before.

        The same on all ranks, each of which must call it; the clock is one when the time that is left is for a save.
        """
        return self._take(_union(self._stops(0.0, saving), self._mesh))

    def _stops(self, seconds: float, saving: bool) -> list[bool]:
        """Which of REASONS this rank knows of, where that many seconds pass before the last save."""
        first = self._mesh.rank == 0
        needed = seconds + self._save_seconds * (2 if saving else 1)
        return [
            self._launch.signals.asked,
            self._launch.launcher.gone(),
            first and (self._dir / STOP_FILE).exists(),
            first and self._deadline is not None and time.monotonic() + needed > self._deadline,
        ]

    def _take(self, stops: Sequence[bool]) -> str | None:
        """Keep the first reason, and answer the file that asks."""
        if self._mesh.rank == 0 and stops[2]:
            (self._dir / STOP_FILE).unlink(missing_ok=True)
        reason = next((reason for reason, asked in zip(REASONS, stops, strict=True) if asked), None)
        self.stop = self.stop or reason
        return reason


def _forget(request: Path) -> None:
    """Remove what an earlier start was asked; what was asked since this process began is meant for this one."""
    with suppress(OSError):
        if request.stat().st_mtime < time.time() - _process_age():
            request.unlink()


def _process_age() -> float:
    """Seconds since this process was started: importing and waiting for other ranks count."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _union(flags: list[bool], mesh: ParallelMesh) -> list[bool]:
    if mesh.world.size == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.int32, device=mesh.device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=mesh.world.group)
    return [bool(flag) for flag in raised.tolist()]
