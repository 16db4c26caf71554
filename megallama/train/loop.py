"""The spine: a run from its first step to its end, on ranks that have met."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megallama.checkpoint.health import way_back
from megallama.checkpoint.reading.store import (
    agree,
    check_weights,
    confirm,
    pick_start,
)
from megallama.checkpoint.state import TrainState, data_identity
from megallama.checkpoint.writing.commit import Retention
from megallama.checkpoint.writing.saver import Saver
from megallama.config.schema import RunConfig
from megallama.data.loader import RunData, prefetched
from megallama.hardware.measure import device_peak
from megallama.layout.budget import batch_at, with_batch
from megallama.layout.frozen import checkpoint_bytes
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh
from megallama.run_dir.metrics import Metrics
from megallama.run_dir.outcome import Reached, write_failure, write_outcome
from megallama.train.copies import differing_copies
from megallama.train.diagnosis import DIAGNOSIS, diagnose
from megallama.train.evaluate import evaluate, evaluate_average
from megallama.train.layer_norms import recorded_layers
from megallama.train.lr_schedule import next_rate
from megallama.train.out_of_memory import memory_explained
from megallama.train.plan_check import check_plan
from megallama.train.profile import profiled
from megallama.train.record import locked, recorded
from megallama.train.rewind import begins_anew, rewound, write_skip
from megallama.train.run import (
    Ending,
    Finished,
    Run,
    build_model,
    build_spikes,
    report_left_out,
    report_start,
    report_uncompiled,
)
from megallama.train.saves import check_loaded, clean_checkpoints, report_saves, save_checkpoint, start_state
from megallama.train.step import train_step
from megallama.train.step_timer import StepTimer
from megallama.train.stop_requests import StopDecision, StopRequests
from megallama.train.stragglers import Stragglers
from megallama.train.train_event import write_train_event
from megallama.train.watchdog import Watchdog


def train(config: RunConfig, mesh: ParallelMesh, data: RunData, launch: Launch) -> Finished:
    """Train `config` as one rank of `mesh`.

    UserError, on every rank alike, for what a user can mend; on one rank alone where that has too little memory.
    """
    folder = Path(config.run.dir)
    identify = partial(data_identity, config, data.train.fingerprint)
    pick = partial(pick_start, config, identify)
    check_weights(agree(pick, mesh), config.model, mesh)  # they are read, and nothing is written yet
    reached = Reached()
    with ExitStack() as stack:
        lock = stack.enter_context(locked(config, mesh))
        requests = StopRequests(folder, lock, mesh, config.train.max_minutes, checkpoint_bytes(config), launch)
        # Whoever held the lock until now may have saved.
        start, damaged = confirm(agree(pick, mesh), config, identify, mesh)
        peak = device_peak(mesh.device, torch.bfloat16 if config.train.dtype == "bf16" else torch.float32)
        metrics = stack.enter_context(recorded(config, mesh, data.tokenizer, peak, reached))
        launch.signals.record(lambda reason: fail_at_once(folder, reason, reached, metrics))
        watchdog = stack.enter_context(watched(config, mesh, reached, metrics))
        stack.enter_context(memory_explained(config, mesh))
        retention = Retention(config.checkpoint.keep, config.checkpoint.keep_every)
        if mesh.rank == 0:
            clean_checkpoints(folder / "checkpoints", start, damaged, retention, metrics)
        model, engine = build_model(config, mesh)
        spikes = build_spikes(config, mesh)
        saver = Saver(folder / "checkpoints", engine, model, mesh, retention)
        run = Run(config, mesh, model, engine, data, metrics, saver, requests, watchdog, reached, peak, spikes)
        try:
            state = start_state(run, start, launch.processors)
            run = replace(run, data=data.begun_at(state.stages, state.passed_over))
            report_left_out(run)
            report_uncompiled(run)
            report_start(run, state)
            reached.step = state.step
            launch.signals.training(elastic=launch.elastic)
            ending = loop(run, state)
        except BaseException:
            watchdog.now("end", patient=True)
            saver.rescue()
            raise
        saver.close()
        dist.barrier(mesh.world.group)  # rank 0 has recorded the outcome: a launcher ends all when the first leaves
    dist.destroy_process_group()
    return Finished(model, ending.status)


@contextmanager
def watched(config: RunConfig, mesh: ParallelMesh, reached: Reached, metrics: Metrics) -> Iterator[Watchdog]:
    """A watchdog over this rank."""
    folder, settings = Path(config.run.dir), config.watchdog
    watchdog = Watchdog(
        folder / "stacks" / f"rank_{mesh.rank:05d}.txt",
        lambda sentence: fail_at_once(folder, f"rank {mesh.rank}: {sentence}", reached, metrics),
        settings.factor,
        settings.least_seconds,
        settings.first_seconds,
    )
    try:
        yield watchdog
    finally:
        watchdog.close()


def fail_at_once(folder: Path, reason: str, reached: Reached, metrics: Metrics) -> None:
    """Record a failure after which the process ends without clearing up; from any thread."""
    write_failure(folder, reason, reached.step)
    metrics.leave()


def loop(run: Run, state: TrainState) -> Ending:
    """Steps until the last, or until something ends them, with evaluations and saves between."""
    every = run.config.evaluation.every, run.config.checkpoint.every, run.config.logging.every
    # A start that was stopped at a step to be evaluated leaves that to the next one.
    # Whether it was done is known by the validation loss alone.
    unknown = run.data.validation is not None and state.validation_loss is None
    missed = due(run.config.evaluation.every, state.step) and unknown
    if state.step == 0 or (missed and state.step < run.last_step(state)):
        state, _ = evaluate_splits(run, state)
    stages = [run.mesh.topology.coordinate(rank, "pp") for rank in range(run.mesh.world.size)]
    stragglers = Stragglers(stages)
    timer, batches = StepTimer(stragglers), prefetched(run.data.train, state.samples)
    batch = batch_at(run.config, state.samples)
    ending, loss, begun = None, 0.0, state
    healthy: bool | None = None
    while ending is None and state.step < run.last_step(state):
        if batch != (batch := batch_at(run.config, state.samples)):
            timer = StepTimer(stragglers)  # what steps take is of this batch from here on
        if run.spikes is not None and begins_anew(run, state, batch):
            run.spikes.remember((), ())
        run.watchdog.now(f"step of {batch} sequences")
        lr = next_rate(run.config, state.seen)
        hopeless = run.saver.failures >= run.config.checkpoint.max_failures
        wishes = partial(run.requests.wishes, saving=run.saver.busy, give_up=hopeless)
        with profiled(run, state.step + 1), timer, recorded_layers(run, state.step + 1):
            with run.mesh.clock.span("data"):
                inputs = next(batches)
            step = train_step(run, inputs, lr, wishes)
            decision = run.requests.decide(step.asked)
        timer.all_ranks(step.seconds)
        loss = step.loss
        if step.applied:
            run.saver.prove(state.step)
        state = state.after(batch, applied=step.applied)
        run.reached.step = state.step
        healthy = state.skipped == 0
        if begun.step > 0:
            check_loaded(run, begun.step, state.step - begun.step, state.skipped, loss)
        if not step.applied:
            write_skip(run, state, batch, step)
        check_plan(with_batch(run.config, batch), run.mesh, run.metrics, state.step, timer)
        report_saves(run)
        if decision.lost is not None:
            return abandon(run, state, decision.lost)
        if state.skipped >= run.config.train.max_skipped:
            if (back := rewound(run, state)) is not None:
                (run, state), timer = back, StepTimer(stragglers)
                begun, batches = state, prefetched(run.data.train, state.samples)
                continue
            diagnose(run, state, inputs)
        last = state.step >= run.last_step(state)
        ending = None if last else ending_after(run, state, decision)
        if due(run.config.health.compare_every, state.step) and (differing := differing_copies(run, state)):
            healthy = False
            agreed = state.step - run.config.health.compare_every  # what was saved since may have what differs
            ending = Ending("failed", f"{differing}; {way_back(run.dir, agreed + 1)}")
        evaluate_now, save_now, log_now = (due(n, state.step) or last for n in every)
        if log_now or ending is not None:
            write_train_event(run, state, batch, step, lr, timer)
        if evaluate_now and ending is None:
            state, finite = evaluate_splits(run, state)
            healthy = healthy and finite
            decision = replace(decision, stop=run.requests.stop)  # one that came meanwhile has ended the evaluation
            ending = None if last else ending_after(run, state, decision)
        if save_now or decision.save or decision.stop is not None:
            with run.mesh.clock.span("checkpoint", whole=True):
                healthy = save_checkpoint(run, state, loss, healthy=healthy)
            run.requests.answer_save()
    return finish(run, state, loss, ending, healthy)


def ending_after(run: Run, state: TrainState, decision: StopDecision) -> Ending | None:
    """Why the run ends before its last step, the same on every rank, or None to go on."""
    if state.skipped >= run.config.train.max_skipped:
        run.watchdog.now("end", patient=True)
        run.saver.wait()  # for what is the newest healthy checkpoint
        # None of these steps changed the weights: a checkpoint of the step before them has the weights that fail.
        why = f"{state.skipped} steps in a row were skipped, see {run.dir / DIAGNOSIS}"
        advice = f"try a lower optimizer.lr or other data; {way_back(run.dir, state.step - state.skipped)}"
        return Ending("failed", f"{why}; {advice}")
    if decision.give_up:
        return Ending("failed", f"{run.config.checkpoint.max_failures} saves in a row failed: {run.saver.last_error}")
    return None if decision.stop is None else Ending("requeue", f"stopped by {decision.stop}")


def abandon(run: Run, state: TrainState, reason: str) -> Ending:
    """End a run whose directory was taken away: nothing is written at its place, which may be another's by now."""
    run.watchdog.now("end", patient=True)
    run.saver.wait()
    report_saves(run)
    run.metrics.write("stop", step=state.step, reason=reason, status="failed")
    return Ending("failed", reason)


def finish(run: Run, state: TrainState, loss: float, ending: Ending | None, healthy: bool | None) -> Ending:
    """Wait for the last save, repeat it where it failed and may, and record how the run ends.

    `healthy` is None where no step was done: then the save that was loaded has told.
    """
    if ending is None:
        done = state.step >= run.total_steps(state)
        ending = Ending("done", "done") if done else Ending("stopped", "stopped by train.stop_after")
    run.watchdog.now("end", patient=True)
    run.saver.wait()
    while ending.status != "failed" and run.saver.last_error is not None:
        report_saves(run)
        if run.saver.failures >= run.config.checkpoint.max_failures:
            ending = Ending("failed", f"the last save failed: {run.saver.last_error}")
            break
        save_checkpoint(run, state, loss, healthy=bool(healthy))
        run.saver.wait()
    if healthy is not False and ending.status != "failed":
        run.saver.prove(state.step)
        run.saver.wait()
    if healthy is False and ending.status != "failed":
        way = way_back(run.dir, state.step)
        run.metrics.write("notice", text=f"this start ends while updates are skipped or numbers are not finite; {way}")
    report_saves(run)
    run.metrics.write("stop", step=state.step, reason=ending.reason, status=ending.status)
    if run.mesh.rank == 0:
        try:
            write_outcome(run.dir, ending.status, state.step, ending.reason)
        except OSError as error:  # the disk that is full may be what ended the run
            print(f"megallama: outcome.json cannot be written ({error.strerror})", file=sys.stderr)
    return ending


def evaluate_splits(run: Run, state: TrainState) -> tuple[TrainState, bool]:
    """Loss and perplexity on train, validation and named sets, and whether all are finite; validation's in the state.

    Those that have not begun when the run is asked to stop are left out. Every rank must call it.
    """
    run.watchdog.now("evaluation")
    finite = True
    for split, data in run.data.evaluated.items():
        stop = run.requests.came(saving=run.saver.busy)
        if stop is not None:
            run.metrics.write("notice", text=f"the evaluation of step {state.step} ends before {split}, for {stop}")
            break
        with run.mesh.clock.span("evaluation", whole=True):
            loss = evaluate(run.engine, data, run.config.evaluation.samples, run.mesh)
        run.metrics.write("eval", step=state.step, split=split, loss=loss, perplexity=math.exp(min(loss, 700.0)))
        finite = finite and math.isfinite(loss)
        if split == "validation" and math.isfinite(loss):
            state = replace(state, validation_loss=loss)
    with run.mesh.clock.span("evaluation", whole=True):
        evaluate_average(run, state)
    return state, finite


def due(every: int, step: int) -> bool:
    """Whether something that happens each `every` steps happens after this one; 0 never does."""
    return every > 0 and step % every == 0
