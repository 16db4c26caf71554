"""Saves that training waits for only while its state is copied.

Each rank's process writes its own file; when all have reached the disk, rank 0's makes them a checkpoint. If one rank
could not write, all drop that save, and training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import torch.distributed as dist

from megallama.checkpoint.format import STATE, TENSORS, folder_name, holds, named_step
from megallama.checkpoint.logical import LogicalTensor, logical_state
from megallama.checkpoint.writing.commit import PARTIAL, Retention
from megallama.checkpoint.writing.snapshot import Snapshot
from megallama.checkpoint.writing.writer import Answer, Writer
from megallama.model.stages import ModelStages
from megallama.parallel.mesh import ParallelMesh

if TYPE_CHECKING:
    from megallama.train.engine import Engine

_DISK_TIMEOUT = timedelta(hours=2)
"""Longest that ranks wait for the slowest one's disk."""


@dataclass(frozen=True)
class SaveResult:
    """What became of a save."""

    step: int
    path: Path
    error: str | None
    """Why it was dropped, or None if the checkpoint exists."""
    blocked_seconds: float
    """The time for which training waited."""
    seconds: float
    """From the request to the end."""
    cpu_seconds: float
    """The processor time of all processes that wrote."""
    bytes: int
    """The size of all tensors, over all ranks."""
    warnings: Sequence[str] = ()
    """What else could not be done, as deleting an old checkpoint."""
    failures: int = 0
    """Saves in a row, up to this one, that were dropped."""


class Saver:
    """Saves of one run into `folder`, one at a time. Every rank makes one, and calls every method at the same step."""

    def __init__(
        self, folder: Path, engine: Engine, model: ModelStages, mesh: ParallelMesh, retention: Retention
    ) -> None:
        self._folder, self._rank, self._retention = folder.absolute(), mesh.rank, retention
        # Of its own: the thread talks while training uses the other groups. Lives without the launcher's store.
        self._group = dist.new_group(backend="gloo", timeout=_DISK_TIMEOUT)
        self._engine, self._held = engine, model.shard_slices
        if mesh.tp.rank > 0:
            # A piece that is the whole tensor is on every tp rank, bit for bit: the first writes it.
            self._held = {name: tuple(p for p in ps if p.size != p.shape) for name, ps in self._held.items()}
        self._snapshot = Snapshot(self._state(), mesh.rank, self._group)
        self._writer = Writer(self._snapshot.descriptor, self._snapshot.size, commits=mesh.rank == 0)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[SaveResult] | None = None
        self._results: list[SaveResult] = []
        self.failures = 0
        """Saves in a row, up to the last that ended, that were dropped."""
        self.last_error: str | None = None
        """Why the last save that ended was dropped, or None if it was not."""
        attempt = [uuid4().hex[:8]]
        dist.broadcast_object_list(attempt, group=self._group)
        self._attempt = attempt[0]
        self._committed, self._proven = 0, 0
        self._unproven = True
        """Whether the newest checkpoint replaces no older one yet."""
        self._tending: Future[Answer] | None = None
        self._notices = [self._snapshot.notice] if self._snapshot.notice else list[str]()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight on this rank."""
        return self._pending is not None and not self._pending.done()

    def save(self, step: int, state: dict[str, object]) -> None:
        """Begin to save after `step`; `state` is what state.json will hold. Waits for the save before, if need be."""
        began = time.perf_counter()
        self.wait()
        self._snapshot.take(self._state())
        blocked = time.perf_counter() - began
        self._pending = self._thread.submit(self._save, step, state, began, blocked)

    def wait(self) -> None:
        """Until no save is in flight on any rank."""
        if self._pending is not None:
            result = self._pending.result()
            self._pending, self.last_error = None, result.error
            self.failures = 0 if result.error is None else self.failures + 1
            self._results.append(replace(result, failures=self.failures))
        if self._tending is not None:
            self._notices += _warnings(self._tending.result())
            self._tending = None

    def prove(self, step: int) -> None:
        """Take note that the weights after `step` are good: from now on their checkpoint replaces older ones."""
        self._proven = step
        if self._rank == 0 and self._unproven and self._committed <= step:
            self._unproven = False
            self._tending = self._thread.submit(self._apply_retention)

    def take_notices(self) -> list[str]:
        """What could not be done since the last call after checkpoints were proven; does not wait."""
        if self._tending is not None and self._tending.done():
            self._notices += _warnings(self._tending.result())
            self._tending = None
        taken, self._notices = self._notices, []
        return taken

    def take_results(self) -> list[SaveResult]:
        """What became of the saves that ended since the last call, on this rank's clock; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()
        taken, self._results = self._results, []
        return taken

    def rescue(self) -> None:
        """Let the save in flight end before this rank does, if no other is gone."""
        with suppress(Exception):
            self.wait()

    def close(self) -> None:
        """Wait for the save in flight and end the writing process."""
        self.wait()
        self._writer.close()  # first: a process that the thread had to start again ends with the thread
        self._thread.shutdown()

    def _state(self) -> dict[str, LogicalTensor]:
        """What this rank writes, by reference."""
        return logical_state(self._engine.fragments(), self._held)

    def _save(self, step: int, state: dict[str, object], began: float, blocked: float) -> SaveResult:
        final = self._folder / folder_name(step)
        partial = final.with_name(f"{final.name}.{PARTIAL}-{self._attempt}")
        path = partial / self._snapshot.file
        answers = self._exchange(self._writer.order("write", path=str(path), bytes=self._snapshot.size))
        outcome = [self._finish(answers, partial, final, state) if self._rank == 0 else {}]
        dist.broadcast_object_list(outcome, group=self._group)
        return SaveResult(
            step=step,
            path=final,
            error=outcome[0].get("error"),
            blocked_seconds=blocked,
            seconds=time.perf_counter() - began,
            cpu_seconds=sum(answer.get("cpu_seconds", 0.0) for answer in [*answers, outcome[0]]),
            bytes=sum(answer.get("bytes", 0) for answer in answers),
            warnings=outcome[0].get("warnings", ()),
        )

    def _exchange(self, answer: Answer) -> list[Answer]:
        answers: list[Answer] = [{}] * dist.get_world_size(self._group)
        dist.all_gather_object(answers, answer, group=self._group)
        return answers

    def _finish(self, answers: list[Answer], partial: Path, final: Path, state: dict[str, object]) -> Answer:
        """Commit if every rank has written, else drop what there is."""
        errors = [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(answers) if "error" in answer]
        if errors:
            self._writer.order("drop", path=str(partial))
            return {"error": "; ".join(errors)}
        written = {
            f"rank_{rank:05d}.bin": {key: answer[key] for key in ("bytes", "sha256")}
            for rank, answer in enumerate(answers)
        }
        documents = {TENSORS: {"dtype": "float32", "tensors": self._snapshot.tensors}, STATE: state}
        saved = time.time()
        outcome = self._writer.order(
            "commit",
            partial=str(partial),
            final=str(final),
            written=written,
            documents=documents,
            saved=saved,
            versions={package: version(package) for package in ("megallama", "torch", "deepspeed")},
        )
        if "error" in outcome and not holds(final, named_step(final), saved):
            self._writer.order("drop", path=str(partial))
            return {"error": f"rank 0: {outcome['error']}"}
        # From here on the checkpoint exists, whatever becomes of the rest.
        self._committed = named_step(final)
        tended = self._apply_retention()
        cpu_seconds = sum(answer.get("cpu_seconds", 0.0) for answer in (outcome, tended))
        return {"warnings": [*_warnings(outcome), *_warnings(tended)], "cpu_seconds": cpu_seconds}

    def _apply_retention(self) -> Answer:
        """Retention, in which the newest checkpoint counts once it is proven."""
        self._unproven = self._proven < self._committed
        arguments = {"retention": asdict(self._retention), "proven": not self._unproven}
        return self._writer.order("apply_retention", path=str(self._folder), **arguments)


def _warnings(answer: Answer) -> list[str]:
    return [*([answer["error"]] if "error" in answer else []), *answer.get("warnings", ())]
