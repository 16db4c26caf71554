"""Loss on samples that are not trained on at that moment."""

from __future__ import annotations

from collections.abc import Iterator

from megallama.config.schema import IGNORE_INDEX
from megallama.data.loader import Loader, MicroBatch
from megallama.errors import SharedError
from megallama.parallel.mesh import ParallelMesh, sum_losses, sum_over
from megallama.train.engine import Engine


def evaluate(engine: Engine, loader: Loader, samples: int, mesh: ParallelMesh) -> float:
    """The token mean of the loss over the first `samples` of the loader's split; every rank must call it.

    UserError, on every rank, where none counts.
    """
    counted = 0

    def batches() -> Iterator[MicroBatch]:
        nonlocal counted
        for batch in loader.evaluation(samples):
            counted += int((batch.labels != IGNORE_INDEX).sum())
            yield batch.to(mesh.device)

    total = engine.evaluate(batches())
    (loss,) = sum_losses([float(total)], mesh)
    (tokens,) = sum_over([counted], mesh.data, mesh.device)
    if tokens == 0:
        raise SharedError("no token of what is evaluated counts, each ends a document or begins one; give other data")
    return loss / tokens
