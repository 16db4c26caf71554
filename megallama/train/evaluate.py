"""Loss on samples that are not trained on at that moment."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megallama.checkpoint.state import TrainState
from megallama.config.schema import IGNORE_INDEX
from megallama.data.loader import Loader, MicroBatch
from megallama.errors import SharedError
from megallama.parallel.mesh import ParallelMesh, sum_losses, sum_over
from megallama.train.average import average_checkpoints
from megallama.train.engine import Engine
from megallama.train.run import Run


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


def evaluate_average(run: Run, state: TrainState) -> None:
    """Loss and perplexity of the average of the weights on validation and named sets, if there is one by now.

    One of checkpoints is renewed where these weights are about to be saved. What has not begun when the run is asked to
    stop is left out. Every rank must call it.
    """
    average, every = run.engine.average, run.config.checkpoint.every
    sets = {split: data for split, data in run.data.evaluated.items() if split != "train"}
    if average is None or state.updates == 0 or not sets or run.requests.stop is not None:
        return
    if (every > 0 and state.step % every == 0) or state.step >= run.last_step(state):
        average_checkpoints(run, state.step)
    if average.what is None or average.what.steps[:1] not in ((), (state.step,)):
        return  # one of checkpoints stays what it was at the last of them
    run.watchdog.now("evaluation of the average")
    with run.engine.averaged():
        for split, data in sets.items():
            if (stop := run.requests.came(saving=run.saver.busy)) is not None:
                text = f"the evaluation of step {state.step} ends before the average on {split}, for {stop}"
                run.metrics.write("notice", text=text)
                break
            loss = evaluate(run.engine, data, run.config.evaluation.samples, run.mesh)
            perplexity = math.exp(min(loss, 700.0))
            run.metrics.write("eval", step=state.step, split=f"average/{split}", loss=loss, perplexity=perplexity)
