"""An average of the weights, cut over the ranks as their fp32 masters are: after every update, or of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from megallama.checkpoint.format import named_checkpoints, step_of
from megallama.checkpoint.health import is_healthy
from megallama.checkpoint.logical import logical_state
from megallama.checkpoint.reading.storage import ShardReader
from megallama.checkpoint.reading.store import damage
from megallama.checkpoint.state import Averaged
from megallama.config.train_keys import AverageConfig
from megallama.parallel.plain import from_first

if TYPE_CHECKING:
    from megallama.train.engine import Fragment
    from megallama.train.run import Run

_AT_ONCE = 1 << 24
"""Elements that change places at once."""


class Average:
    """The averages of `masters`, flat fp32 tensors; it begins as a copy of them.

    An exponential one lies beside them, one of checkpoints on the host.
    """

    def __init__(self, masters: Sequence[nn.Parameter], settings: AverageConfig) -> None:
        assert settings.kind != "none"
        self.kind = settings.kind
        self.checkpoints = settings.checkpoints
        """How many an average of the latest is of."""
        self.what: Averaged | None = None
        """What it is; None for one of checkpoints that is of none yet."""
        self._decay, self._updates = settings.decay, 0
        host = torch.device("cpu")
        self._of = {m: torch.zeros_like(m, device=host if self.kind == "latest" else m.device) for m in masters}

    def of(self, master: nn.Parameter) -> Tensor:
        """The average of one of the masters, by reference."""
        return self._of[master].detach()

    @torch.no_grad()
    def begin(self, updates: int) -> None:
        """Take over the masters, which are those of `updates` steps; what was stored of an average follows."""
        self._updates = updates
        for master, average in self._of.items():
            average.copy_(master)
        self.what = Averaged("exponential") if self.kind == "exponential" else None

    @torch.no_grad()
    def update(self) -> None:
        """Take an update of the masters into an exponential average: one pass over both, without waiting for it."""
        if self.kind == "exponential":
            # While there are few, the weights of the beginning would be most of it.
            decay = min(self._decay, self._updates / (self._updates + 9))
            torch._foreach_lerp_(list(self._of.values()), list(self._of), 1 - decay)
        self._updates += 1

    @torch.no_grad()
    def exchange(self) -> None:
        """Masters and averages change places, piece by piece: there is no third copy."""
        for master, average in self._of.items():
            for mine, other in zip(master.split(_AT_ONCE), average.split(_AT_ONCE), strict=True):
                kept = mine.clone()
                mine.copy_(other)
                other.copy_(kept)


def average_checkpoints(run: Run, step: int) -> None:
    """Make an average of the latest checkpoints that of these weights, of `step`, and of those saved before.

    Reads the weights of these as a start at this layout would, after a look at every byte: one that is damaged is left
    out, and said. Ranks wait for the save in flight, which is one of them. A run that is asked to stop has no time for
    that: its average stays what it was. Every rank must call it.
    """
    average, mesh = run.engine.average, run.mesh
    if average is None or average.kind != "latest" or (average.what and average.what.steps[0] == step):
        return
    if run.requests.stop is not None:
        if average.what is None:
            average.begin(0)
            average.what = Averaged("latest", (step,))
        return
    run.watchdog.now("average of checkpoints", patient=True)
    run.saver.wait()
    oldest = step - average.checkpoints * run.config.checkpoint.every  # keep_every keeps some that are far away
    found = [str(path) for path in _between(run.dir / "checkpoints", oldest, step)] if mesh.rank == 0 else []
    average.begin(0)
    steps = [step]
    for path in map(Path, from_first(found, mesh.world.group, mesh.device)):
        if len(steps) == average.checkpoints:
            break
        if reasons := damage(path, mesh):
            run.metrics.write("notice", text=f"{path.name} is not in the average of the weights: {reasons[0]}")
            continue
        steps.append(step_of(path))
        for fragment, weights in _read(run, path):
            assert fragment.average is not None
            fragment.average.lerp_(weights, 1 / len(steps))
    average.what = Averaged("latest", tuple(steps))


def _between(folder: Path, oldest: int, step: int) -> list[Path]:
    """Healthy checkpoints of steps after `oldest` and before `step`, whole or not, the newest first."""
    return [path for path in named_checkpoints(folder) if oldest < step_of(path) < step and is_healthy(path)]


def _read(run: Run, path: Path) -> Iterator[tuple[Fragment, Tensor]]:
    """Of each fragment that has an average, the weights that the checkpoint `path` has in its place, on the host."""
    averaged = [fragment for fragment in run.engine.fragments() if fragment.average is not None]
    weights = [torch.zeros(fragment.master.shape) for fragment in averaged]  # what only fills up stays zero
    read = [replace(f, master=w, moments={}, average=None) for f, w in zip(averaged, weights, strict=True)]
    dcp.load(dict(logical_state(read, run.model.shard_slices)), storage_reader=ShardReader(path))
    return zip(averaged, weights, strict=True)
