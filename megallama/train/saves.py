"""Where a run takes up its state, and how it keeps it: checkpoints as the loop sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megallama.checkpoint.finite import state_is_finite
from megallama.checkpoint.health import way_back
from megallama.checkpoint.reading.rollback import pass_over, record_return, return_to
from megallama.checkpoint.reading.store import (
    Start,
    has_average,
    load,
    load_initial_weights,
)
from megallama.checkpoint.state import Saved, TrainState, data_identity, read_saved, state_document
from megallama.checkpoint.writing.commit import Retention, apply_retention, quarantine
from megallama.errors import NotFiniteError
from megallama.layout.budget import batch_at, schedule_batch, stage_samples
from megallama.layout.frozen import frozen_weights
from megallama.run_dir.metrics import Metrics
from megallama.train.average import average_checkpoints
from megallama.train.run import Run, draw_weights


def clean_checkpoints(
    folder: Path, start: Start, damaged: Mapping[Path, str], retention: Retention, metrics: Metrics
) -> None:
    """Set aside and delete what earlier starts left that is not whole or not kept, and say so."""
    for notice in quarantine(folder, damaged):
        metrics.write("notice", text=notice)
    for notice in start.notices:
        metrics.write("notice", text=notice)
    if start.resume is not None:
        if start.back:
            metrics.write("rollback", **return_to(start.resume).facts)
            record_return(start.resume)
        # The start before may have been killed between a save and this, and this one may have none to save.
        for notice in [*pass_over(start.resume), *apply_retention(folder, retention, proven=False)]:
            metrics.write("notice", text=notice)


def start_state(run: Run, start: Start, threads: int) -> TrainState:
    """Where the run stands: the newest checkpoint, the weights of another run, or weights that `threads` draw."""
    if start.resume is not None:
        state = continued(run, start.resume)
        report_thaw(run, read_saved(start.resume))
        run.metrics.write("resume", step=state.step, samples=state.samples, path=str(start.resume))
        if not state_is_finite(run.engine.fragments(), run.mesh):
            what = f"weights or moments of {start.resume} are not finite"
            raise NotFiniteError(f"{what}; {way_back(run.dir, state.step)}")
        return state
    if start.weights is not None:
        load_initial_weights(start.weights, run.engine, run.model)
        if not state_is_finite(run.engine.fragments(), run.mesh):
            what = f"checkpoint.init_from={start.weights} has weights that are not finite"
            raise NotFiniteError(f"{what}; use another checkpoint")
    else:
        draw_weights(run.config, run.model, run.engine, threads)
    return TrainState(first_batch=batch_at(run.config, 0), stages=stage_samples(run.config))


def continued(run: Run, path: Path) -> TrainState:
    """Where the run stands that goes on from the checkpoint `path`, which is loaded; every rank must call it."""
    state = load(path, run.engine, run.model)
    state = replace(state, first_batch=schedule_batch(run.config, state.seen))
    saved = read_saved(path)
    report_average(run, path, saved)
    state = in_sequences(run, state, saved.data.sequence_length)
    if run.spikes is not None:
        now = frozen_weights(run.config.model, run.config.train.freeze), run.config.optimizer.z_loss
        same = (saved.frozen, saved.z_loss) == now  # else norms are of others
        run.spikes.remember(*((state.losses, state.norms) if same else ((), ())))
    return replace(state, stages=stage_samples(run.config, state.seen))


def in_sequences(run: Run, state: TrainState, before: int | None) -> TrainState:
    """The state with its tokens counted in the run's sequences, which were of `before` tokens when it was saved."""
    now = run.config.data.sequence_length
    if before in (None, now):
        return state
    counted = state.in_sequences_of(now, before)
    seen = f"the {state.samples * before:,} tokens seen count as {counted.samples:,} sequences"
    run.metrics.write("notice", text=f"data.sequence_length was {before} and is {now}: {seen} of a new order")
    return counted


def report_thaw(run: Run, saved: Saved) -> None:
    """Say which weights are frozen, or trained, that were not when the checkpoint was saved."""
    before, now = saved.frozen, frozen_weights(run.config.model, run.config.train.freeze)
    changes = (
        (before - now, "trained from here on, with moments that start at zero"),
        (now - before, "frozen from here on, and saved without moments"),
    )
    for names, what in changes:
        if names:
            others = f" and {len(names) - 1} more weights are" if len(names) > 1 else " is"
            run.metrics.write("notice", text=f"train.freeze has changed: {min(names)}{others} {what}")


def report_average(run: Run, path: Path, saved: Saved) -> None:
    """Say that an exponential average begins anew, where the checkpoint that is continued has none."""
    average = run.engine.average
    if average is not None and average.kind == "exponential" and not has_average(saved, run.engine):
        text = f"{path.name} has no exponential average of the weights, which begins with the weights at this step"
        run.metrics.write("notice", text=text)


def check_loaded(run: Run, step: int, done: int, skipped: int, loss: float) -> None:
    """NotFiniteError where what was loaded at `step` cannot be trained on, as the steps `done` since then show.

    That is so if the first loss is not finite, or if the weights are large beyond measure and two steps were skipped:
    of one its data may be the reason. The last `skipped` steps were. Every rank must call it.
    """
    why = ""
    if done == 1 and not math.isfinite(loss):
        why = "give a loss that is not finite"
    if done == 2 <= skipped and not state_is_finite(run.engine.fragments(), run.mesh, squares=True):
        why = "are too large: no gradient is finite"
    if why:
        raise NotFiniteError(f"the weights that were loaded at step {step} {why}; {way_back(run.dir, step)}")


def save_checkpoint(run: Run, state: TrainState, loss: float, *, healthy: bool) -> bool:
    """Begin to save everything that the run needs to go on; every rank must call it.

    Returns whether the checkpoint is healthy: as far as the caller knows, and by its loss and its numbers.
    """
    average_checkpoints(run, state.step)
    run.watchdog.now("save", patient=True)
    config, mesh = run.config, run.mesh
    healthy = state_is_finite(run.engine.fragments(), mesh, squares=True) and healthy and math.isfinite(loss)
    layout: dict[str, object] = {
        "tensor": config.parallel.tensor,
        "pipeline": config.parallel.pipeline,
        "schedule": config.parallel.schedule,
        "context": config.parallel.context,
        "context_mode": config.parallel.context_mode,
        "data": mesh.topology.dp,
        "zero_stage": config.zero.stage,
        "dtype": config.train.dtype,
    }
    train = config.train
    losses, norms = ((), ()) if run.spikes is None else run.spikes.remembered
    newest = run.data.train.place(max(0, state.samples - 1))
    stages = tuple(first for first in state.stages if first <= newest)
    begun = replace(state, stages=stages, losses=losses, norms=norms)
    identity = data_identity(config, run.data.train.fingerprint, config.data.sequence_length, begun.seen)
    average = None if run.engine.average is None else run.engine.average.what
    document = state_document(
        begun,
        loss,
        healthy,
        identity,
        config.model,
        layout,
        train.objective,
        train.freeze,
        average,
        config.optimizer.z_loss,
    )
    run.saver.save(state.step, document)
    if not config.checkpoint.asynchronous:
        run.saver.wait()
    return healthy


def report_saves(run: Run) -> None:
    """Record the saves that ended since the last call."""
    for result in run.saver.take_results():
        seconds = {"seconds": result.seconds, "blocked_seconds": result.blocked_seconds}
        if result.error is None:
            run.requests.save_took(result.seconds)
            run.metrics.write("checkpoint", step=result.step, path=str(result.path), bytes=result.bytes, **seconds)
        else:
            count = {"failures": result.failures}
            run.metrics.write("checkpoint_failed", step=result.step, reason=result.error, **seconds, **count)
        for warning in result.warnings:
            run.metrics.write("notice", text=warning)
    for warning in run.saver.take_notices():
        run.metrics.write("notice", text=warning)
