"""Loss on samples that are not trained on at that moment."""

from __future__ import annotations

import torch

from megallama.data.loader import Loader
from megallama.engine import Engine
from megallama.labels import IGNORED
from megallama.parallel.mesh import ParallelMesh, sum_over


def evaluate(engine: Engine, loader: Loader, samples: int, mesh: ParallelMesh) -> float:
    """The token mean of the loss over the first `samples` of the loader's split; every rank must call it."""
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    counted = 0
    for batch in loader.evaluation(samples):
        total += engine.evaluate(batch.tokens.to(mesh.device), batch.labels.to(mesh.device))
        counted += int((batch.labels != IGNORED).sum())
    loss, tokens = sum_over([float(total), counted], mesh.data, mesh.device)
    return loss / tokens
