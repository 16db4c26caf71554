"""The spine: a run from its config to its end.

Everything a user can get wrong is found before the process groups exist and before anything is written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megallama.checkpoint.finite import state_is_finite
from megallama.checkpoint.health import way_back
from megallama.checkpoint.reading.rollback import pass_over, record_return, return_to
from megallama.checkpoint.reading.store import (
    Start,
    agree,
    check_weights,
    confirm,
    load,
    load_initial_weights,
    pick_start,
)
from megallama.checkpoint.state import DataIdentity, TrainState, read_saved, state_document
from megallama.checkpoint.writing.commit import Retention, apply_retention, quarantine
from megallama.checkpoint.writing.saver import Saver
from megallama.config.schema import IGNORE_INDEX, RunConfig
from megallama.data.loader import Loader, MicroBatch, prefetched
from megallama.data.tokenizer import load_tokenizer
from megallama.errors import NotFiniteError
from megallama.layout.budget import schedule_batch, total_steps
from megallama.layout.check import Batching
from megallama.layout.counts import flops_per_token
from megallama.layout.stages import stages
from megallama.layout.topology import Topology
from megallama.model.init import initialise
from megallama.model.llama import TensorParallelContext
from megallama.model.stages import ModelStages
from megallama.parallel.join import join
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh, build_mesh, sum_losses
from megallama.run_dir.limits import check_run_dir, checkpoint_bytes
from megallama.run_dir.outcome import Reached, Status, write_failure, write_outcome
from megallama.train.agreement import check_same, facts_of
from megallama.train.device_peak import Peak, device_peak, peak_memory_bytes
from megallama.train.engine import Engine, StepResult
from megallama.train.evaluate import evaluate
from megallama.train.lr_schedule import next_rate
from megallama.train.metrics import Metrics, check_sinks
from megallama.train.out_of_memory import memory_explained
from megallama.train.plan_check import check_plan
from megallama.train.record import locked, recorded
from megallama.train.step_timer import StepTimer
from megallama.train.stop_requests import StopDecision, StopRequests
from megallama.train.watchdog import Watchdog


@dataclass(frozen=True)
class Ending:
    """How a start of a run ends."""

    status: Status
    reason: str


@dataclass(frozen=True)
class Finished:
    """What is left of a run in this process."""

    model: ModelStages
    """This rank's part of the trained model."""
    status: Status


@dataclass(frozen=True)
class Run:
    """What the loop works with; nothing in it says how the model is spread."""

    config: RunConfig
    mesh: ParallelMesh
    model: ModelStages
    engine: Engine
    train_data: Loader
    validation_data: Loader | None
    metrics: Metrics
    saver: Saver
    requests: StopRequests
    watchdog: Watchdog
    reached: Reached
    peak: Peak

    @property
    def dir(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir)

    def total_steps(self, state: TrainState) -> int:
        """Steps of the whole run, as far as is known at `state`: a length in tokens depends on the batches."""
        return total_steps(self.config, state.seen)

    def last_step(self, state: TrainState) -> int:
        """The step after which this start ends."""
        total = self.total_steps(state)
        return min(total, self.config.train.stop_after or total)


def train(config: RunConfig, batching: Batching, launch: Launch, device: torch.device) -> Finished:
    """Train `config`, which is legal with that `batching`, as one rank of the job.

    UserError, on every rank alike, for what a user can mend; on one rank alone where that has too little memory.
    """
    check_run_dir(config)
    if launch.rank == 0:
        check_sinks(config)
    topology = Topology(pp=config.parallel.pipeline, dp=batching.dp_size, tp=config.parallel.tensor)
    train_data, validation_data = open_data(config, topology, launch.rank)
    tokenizer = load_tokenizer(config.data.tokenizer)
    identify = partial(data_identity, config, train_data)
    pick = partial(pick_start, config, identify)
    pick()  # each rank for itself: what a user can mend is said before any waits for another

    facts = facts_of(config, train_data, validation_data, tokenizer)

    join(launch, device)
    check_same(facts, device)  # before the groups: ranks of another layout would make others, and wait for ever
    mesh = build_mesh(topology, launch, device)
    check_weights(agree(pick, mesh), mesh)  # they are read, and nothing is written yet
    folder = Path(config.run.dir) / "checkpoints"
    peak = device_peak(device, torch.bfloat16 if config.train.dtype == "bf16" else torch.float32)
    reached = Reached()
    with ExitStack() as stack:
        lock = stack.enter_context(locked(config, mesh))
        minutes, save_bytes = config.train.max_minutes, checkpoint_bytes(config)
        requests = StopRequests(Path(config.run.dir), lock, mesh, minutes, save_bytes, launch)
        # Whoever held the lock until now may have saved.
        start, damaged = confirm(agree(pick, mesh), config, identify, mesh)
        metrics = stack.enter_context(recorded(config, mesh, tokenizer, peak, reached))
        launch.signals.record(lambda reason: write_failure(Path(config.run.dir), reason, reached.step))
        watchdog = stack.enter_context(watched(config, mesh, reached))
        stack.enter_context(memory_explained(config, mesh))
        retention = Retention(config.checkpoint.keep, config.checkpoint.keep_every)
        if mesh.rank == 0:
            clean_checkpoints(folder, start, damaged, retention, metrics)
        model, engine = build_model(config, mesh, batching.gradient_accumulation_steps)
        saver = Saver(folder, engine, model, mesh, retention)
        run = Run(
            config,
            mesh,
            model,
            engine,
            train_data,
            validation_data,
            metrics,
            saver,
            requests,
            watchdog,
            reached,
            peak,
        )
        try:
            state = start_state(run, start)
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


def open_data(config: RunConfig, topology: Topology, rank: int) -> tuple[Loader, Loader | None]:
    """This rank's train and validation data. UserError where they do not suit the model."""

    def open_split(split: str) -> Loader:
        return Loader(
            config.data,
            "train" if split == "train" else "validation",
            config.train.micro_batch_size,
            config.train.global_batch_size,
            topology.coordinate(rank, "dp"),
            topology.dp,
            config.train.seed,
            config.model.vocab_size,
        )

    held_out = config.data.validation_path is not None or config.data.validation_fraction > 0
    return open_split("train"), open_split("validation") if held_out else None


def build_model(config: RunConfig, mesh: ParallelMesh, micro_batches: int) -> tuple[ModelStages, Engine]:
    """This rank's part of the model, initialised, and the engine around it for that many micro-batches per step."""
    mine = {stage.index: stage.layers for stage in stages(config) if stage.rank == mesh.pp.rank}
    tp_context = TensorParallelContext(mesh.tp, config.parallel.sequence_parallel)
    model = ModelStages(config.model, mine, tp_context, recompute=config.train.recompute)
    initialise(
        model,
        model.shard_slices(),
        seed=config.train.seed,
        num_layers=config.model.num_hidden_layers,
        scheme=config.model.init,
        std=config.model.initializer_range,
    )
    if config.train.compile:
        for layer in model.decoder_layers():
            layer.compile()
    return model, Engine(model, config, mesh, micro_batches)


def data_identity(config: RunConfig, data: Loader, sequence_length: int) -> DataIdentity:
    """What the position of a checkpoint counts in, of a run with sequences of that length."""
    return DataIdentity(data.fingerprint(sequence_length), config.train.seed, sequence_length)


@contextmanager
def watched(config: RunConfig, mesh: ParallelMesh, reached: Reached) -> Iterator[Watchdog]:
    """A watchdog over this rank."""
    folder, settings = Path(config.run.dir), config.watchdog
    watchdog = Watchdog(
        folder / "stacks" / f"rank_{mesh.rank:05d}.txt",
        lambda sentence: write_failure(folder, f"rank {mesh.rank}: {sentence}", reached.step),
        settings.factor,
        settings.least_seconds,
        settings.first_seconds,
    )
    try:
        yield watchdog
    finally:
        watchdog.close()


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


def start_state(run: Run, start: Start) -> TrainState:
    """Where the run stands: the newest checkpoint, the weights of another run, or the beginning."""
    if start.resume is not None:
        state = load(start.resume, run.engine, run.model)
        state = replace(state, first_batch=schedule_batch(run.config, state.seen))
        state = in_sequences(run, state, read_saved(start.resume).data.sequence_length)
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
    return TrainState(first_batch=run.config.train.global_batch_size)


def in_sequences(run: Run, state: TrainState, before: int | None) -> TrainState:
    """The state with its tokens counted in the run's sequences, which were of `before` tokens when it was saved."""
    now = run.config.data.sequence_length
    if before in (None, now):
        return state
    counted = state.in_sequences_of(now, before)
    seen = f"the {state.samples * before:,} tokens seen count as {counted.samples:,} sequences"
    run.metrics.write("notice", text=f"data.sequence_length was {before} and is {now}: {seen} of a new order")
    return counted


def check_loaded(run: Run, step: int, done: int, skipped: int, loss: Tensor) -> None:
    """NotFiniteError where what was loaded at `step` cannot be trained on, as the steps `done` since then show.

    That is so if the first loss is not finite, or if the weights are large beyond measure and two steps were skipped:
    of one its data may be the reason. Every rank must call it.
    """
    why = ""
    if done == 1 and not math.isfinite(*sum_losses([float(loss)], run.mesh)):
        why = "give a loss that is not finite"
    if done == skipped == 2 and not state_is_finite(run.engine.fragments(), run.mesh, squares=True):
        why = "are too large: no gradient is finite"
    if why:
        raise NotFiniteError(f"the weights that were loaded at step {step} {why}; {way_back(run.dir, step)}")


def loop(run: Run, state: TrainState) -> Ending:
    """Steps until the last, or until something ends them, with evaluations and saves between."""
    every = run.config.evaluation.every, run.config.checkpoint.every, run.config.logging.every
    # A start that was stopped at a step to be evaluated leaves that to the next one.
    # Whether it was done is known by the validation loss alone.
    unknown = run.validation_data is not None and state.validation_loss is None
    missed = due(run.config.evaluation.every, state.step) and unknown
    if state.step == 0 or (missed and state.step < run.last_step(state)):
        state, _ = evaluate_splits(run, state)
    timer, batches = StepTimer(), prefetched(run.train_data, state.samples)
    ending, loss, skipped, begun = None, torch.zeros(()), 0, state
    healthy: bool | None = None
    while ending is None and state.step < run.last_step(state):
        run.watchdog.now("step")
        lr = next_rate(run.config, state.seen)
        with timer:
            loss, result = train_step(run, next(batches), lr)
        if result.applied:
            run.saver.prove(state.step)
        state = state.after(run.config.train.global_batch_size, applied=result.applied)
        run.reached.step = state.step
        skipped = 0 if result.applied else skipped + 1
        healthy = skipped == 0
        if begun.step > 0:
            check_loaded(run, begun.step, state.step - begun.step, skipped, loss)
        if skipped:
            run.metrics.write("skip", step=state.step, samples=state.samples)
        check_plan(run.config, run.mesh, run.metrics, state.step, timer)
        report_saves(run)
        hopeless = run.saver.failures >= run.config.checkpoint.max_failures
        decision = run.requests.agree(saving=run.saver.busy, give_up=hopeless)
        if decision.lost is not None:
            return abandon(run, state, decision.lost)
        last = state.step >= run.last_step(state)
        ending = None if last else ending_after(run, state, skipped, decision)
        evaluate_now, save_now, log_now = (due(n, state.step) or last for n in every)
        if log_now or ending is not None:
            write_train_event(run, state, loss, result.grad_norm, lr, timer.take())
        if evaluate_now and ending is None:
            state, finite = evaluate_splits(run, state)
            healthy = healthy and finite
        if save_now or decision.save or decision.stop is not None:
            healthy = save_checkpoint(run, state, loss, healthy=healthy)
    return finish(run, state, loss, ending, healthy)


def ending_after(run: Run, state: TrainState, skipped: int, decision: StopDecision) -> Ending | None:
    """Why the run ends before its last step, the same on every rank, or None to go on."""
    if skipped >= run.config.train.max_skipped:
        run.watchdog.now("end", patient=True)
        run.saver.wait()  # for what is the newest healthy checkpoint
        reason = f"{skipped} steps in a row had a gradient that is not finite; try a lower optimizer.lr or other data"
        # None of these steps changed the weights: a checkpoint of the step before them has the weights that fail.
        return Ending("failed", f"{reason}; {way_back(run.dir, state.step - skipped)}")
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


def finish(run: Run, state: TrainState, loss: Tensor, ending: Ending | None, healthy: bool | None) -> Ending:
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


def train_step(run: Run, batches: list[MicroBatch], lr: float) -> tuple[Tensor, StepResult]:
    """One optimizer step; the loss is this rank's share of the token mean over the global batch."""
    # The engine averages over data-parallel ranks; a token mean is the sum over all of them by the count of all.
    scale = run.mesh.data.size / count_labels(batches, run.mesh)
    loss = run.engine.forward_backward(on_device(batches, run.mesh.device), scale)
    return loss, run.engine.step(lr)


def count_labels(batches: list[MicroBatch], mesh: ParallelMesh) -> Tensor:
    """Labels that count in the whole global batch, left on the device so that nothing waits for it."""
    here = float(sum(int((b.labels != IGNORE_INDEX).sum()) for b in batches))
    counted = torch.full((), here, device=mesh.device)  # a kernel: a copy from the host would be waited for
    if mesh.data.size > 1:
        dist.all_reduce(counted, group=mesh.data.group)
    return counted


def on_device(batches: list[MicroBatch], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, labels) of each micro-batch, copied while the one before computes."""
    for batch in batches:
        tokens, labels = batch.tokens, batch.labels
        if device.type == "cuda":
            tokens, labels = tokens.pin_memory(), labels.pin_memory()
        yield tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def write_train_event(run: Run, state: TrainState, loss: Tensor, grad_norm: float, lr: float, seconds: float) -> None:
    """Record a step that took `seconds`; every rank must call it."""
    config, sequence = run.config, run.config.data.sequence_length
    (total,) = sum_losses([float(loss)], run.mesh)
    speed = config.tokens_per_step / seconds
    at_peak = run.peak.flops * run.mesh.world.size
    run.metrics.write(
        "train",
        step=state.step,
        total_steps=run.total_steps(state),
        tokens=state.samples * sequence,
        samples=state.samples,
        loss=total / run.mesh.data.size,
        grad_norm=grad_norm,
        lr=lr,
        seconds=seconds,
        tokens_per_second=speed,
        mfu=speed * flops_per_token(config.model, sequence, "full") / at_peak,
        mfu_causal=speed * flops_per_token(config.model, sequence, "causal") / at_peak,
        peak_memory_bytes=peak_memory_bytes(run.mesh.device),
    )


def evaluate_splits(run: Run, state: TrainState) -> tuple[TrainState, bool]:
    """Loss and perplexity on train and validation data, the latter also in the state, and whether both are finite.

    Every rank must call it.
    """
    run.watchdog.now("evaluation")
    finite = True
    for split, data in (("train", run.train_data), ("validation", run.validation_data)):
        if data is not None:
            loss = evaluate(run.engine, data, run.config.evaluation.samples, run.mesh)
            run.metrics.write("eval", step=state.step, split=split, loss=loss, perplexity=math.exp(min(loss, 700.0)))
            finite = finite and math.isfinite(loss)
            if split == "validation" and math.isfinite(loss):
                state = replace(state, validation_loss=loss)
    return state, finite


def save_checkpoint(run: Run, state: TrainState, loss: Tensor, *, healthy: bool) -> bool:
    """Begin to save everything that the run needs to go on; every rank must call it.

    Returns whether the checkpoint is healthy: as far as the caller knows, and by its loss and its numbers.
    """
    run.watchdog.now("save", patient=True)
    config, mesh = run.config, run.mesh
    (total,) = sum_losses([float(loss)], mesh)
    healthy = state_is_finite(run.engine.fragments(), mesh, squares=True) and healthy and math.isfinite(total)
    layout: dict[str, object] = {
        "tensor": config.parallel.tensor,
        "pipeline": config.parallel.pipeline,
        "schedule": config.parallel.schedule,
        "data": mesh.data.size,
        "zero_stage": config.zero.stage,
        "dtype": config.train.dtype,
    }
    identity = data_identity(config, run.train_data, config.data.sequence_length)
    run.saver.save(state.step, state_document(state, total / mesh.data.size, healthy, identity, config.model, layout))
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


def due(every: int, step: int) -> bool:
    """Whether something that happens each `every` steps happens after this one; 0 never does."""
    return every > 0 and step % every == 0
