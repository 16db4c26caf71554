"""One optimizer step on all ranks, and what they tell each other in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megallama.config.schema import IGNORE_INDEX
from megallama.data.loader import MicroBatch
from megallama.parallel.clock import SPANS
from megallama.parallel.mesh import ParallelMesh
from megallama.train.run import Run
from megallama.train.spikes import Spikes
from megallama.train.stragglers import Seconds

Wishes: TypeAlias = Callable[[], Sequence[bool]]


@dataclass(frozen=True)
class Step:
    """What a step did; the same on every rank."""

    loss: float
    """The token mean over the global batch."""
    grad_norm: float
    """Over all parameters, before clipping; inf when not finite."""
    applied: bool
    """False where every rank skipped the update."""
    vetoed: tuple[bool, ...]
    """Whether loss and norm stood out; empty where the norm was not finite."""
    asked: tuple[bool, ...]
    """The wishes of any rank."""
    seconds: Seconds
    """What each rank spent its time on from the step before to the beginning of this one."""


def train_step(run: Run, batches: list[MicroBatch], lr: float, wishes: Wishes = tuple) -> Step:
    """Forward, backward and update of a global batch; `batches` are this rank's part of it.

    `wishes` is called once, as late as can be: what comes after it is for the next step.
    """
    mesh, table = run.mesh, Table(run.mesh)
    # The engine averages over data-parallel ranks; a token mean is the sum over all of them by the count of all.
    # Where no label counts, the loss is 0 and so is the gradient.
    scale = mesh.data.size / count_labels(batches, mesh).clamp(min=1)
    loss = run.engine.forward_backward(batches, scale)

    def share(square: Tensor) -> tuple[Tensor, Tensor]:
        with mesh.clock.span("other"):
            wished = wishes()  # which looks at files
        mean, norm = table.share(loss, square, wished)
        return norm, table.judge(mean, norm, run.spikes)

    run.engine.step(lr, share)
    step = table.read()
    if step.applied and run.engine.average is not None:
        with mesh.clock.span("optimizer"):
            run.engine.average.update()
    return step


class Table:
    """A row for each rank: its parts of the loss and of the squared norm, its wishes, and where its time went.

    Shared by one all-reduce of rows that are 0 but for each rank's own: in a tree that takes as long for a thousand
    ranks as a gather in a ring does for a few. All ranks then add up the same bits.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh, self._wishes = mesh, 0
        self._rows = torch.zeros(mesh.world.size, 3 + len(SPANS), dtype=torch.float64, device=mesh.device)
        self._marks = mesh.clock.take()
        self._copies = mesh.data.size * mesh.tp.size  # the loss has that scale, and all of tp have it
        self._told = torch.zeros(0)
        self._copied = torch.cuda.Event() if mesh.device.type == "cuda" else None

    def share(self, loss: Tensor, square: Tensor, wishes: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """The mean of the loss and the norm of the gradient on every rank, left on the device."""
        mine = self._rows[self._mesh.rank]
        seconds = torch.tensor(self._mesh.clock.seconds(self._marks), dtype=torch.float64)
        if self._mesh.device.type == "cuda":
            seconds = seconds.pin_memory()  # else the copy would wait for what is computed
        mine[3:].copy_(seconds, non_blocking=True)
        mine[0], mine[1] = loss, square
        mine[2].fill_(sum(wish << place for place, wish in enumerate(wishes)))
        if self._mesh.world.size > 1:
            with self._mesh.world.timed():
                dist.all_reduce(self._rows, group=self._mesh.world.group)
        self._wishes = len(wishes)
        return self._rows[:, 0].sum() / self._copies, self._rows[:, 1].sum().sqrt()

    def judge(self, mean: Tensor, norm: Tensor, spikes: Spikes | None) -> Tensor:
        """Whether the step is not to be applied, since it stands out; on the device.

        All that `read` returns sets out for the host here, ahead of the update: while that runs, the host begins the
        next step.
        """
        out = norm.new_zeros(0, dtype=torch.bool) if spikes is None else spikes.judge(mean, norm)
        told = torch.cat([self._rows.flatten(), torch.stack([mean, norm]), out.double()])
        self._told = told.to("cpu", non_blocking=True)  # pinned
        if self._copied is not None:
            self._copied.record()
        return out.any()

    def read(self) -> Step:
        """What the step does; the one time in a step that the host waits, for gradients and not for the update."""
        if self._copied is not None:
            self._copied.synchronize()
        told, cells = self._told.numpy(), self._rows.numel()
        rows, (loss, norm, *out) = told[:cells].reshape(self._rows.shape), map(float, told[cells:])
        finite = math.isfinite(norm)
        asked = int(np.bitwise_or.reduce(rows[:, 2].astype(np.int64)))
        vetoed = tuple(map(bool, out)) if finite else ()
        return Step(
            loss=loss,
            grad_norm=norm if finite else math.inf,
            applied=finite and not any(vetoed),
            vetoed=vetoed,
            asked=tuple(bool(asked >> place & 1) for place in range(self._wishes)),
            seconds=rows[:, 3:].copy(),  # a view would keep what the table was copied to
        )


def count_labels(batches: list[MicroBatch], mesh: ParallelMesh) -> Tensor:
    """Labels that count in the whole global batch, left on the device so that nothing waits for it."""
    here = float(sum(np.count_nonzero(b.labels.numpy() != IGNORE_INDEX) for b in batches))
    counted = torch.full((), here, device=mesh.device)  # a kernel: a copy from the host would be waited for
    if mesh.data.size > 1:
        with mesh.data.timed():
            dist.all_reduce(counted, group=mesh.data.group)
    return counted
