"""The event that a step leaves in the metrics: what it trained, how fast, and where the time went."""

from __future__ import annotations

from functools import partial

from megallama.checkpoint.state import TrainState
from megallama.data.mixture import Mixture
from megallama.hardware.measure import peak_memory_bytes
from megallama.layout.budget import samples_at_step
from megallama.layout.counts import flops_per_token, kernel_convention
from megallama.layout.frozen import frozen_matmul
from megallama.train.run import Run
from megallama.train.step import Step
from megallama.train.step_timer import StepTimer


def write_train_event(run: Run, state: TrainState, batch: int, step: Step, lr: float, timer: StepTimer) -> None:
    """Record `step`, of `batch` sequences, and which ranks the others have come to wait for."""
    config, sequence, seconds = run.config, run.config.data.sequence_length, timer.take()
    speed, total_steps = batch * sequence / seconds, run.total_steps(state)
    left = samples_at_step(config, total_steps, state.seen) - state.samples
    at_peak, convention = run.peak.flops * run.mesh.world.size, kernel_convention(config.train.objective)
    flops = partial(flops_per_token, config.model, sequence, frozen=frozen_matmul(config))
    run.metrics.write(
        "train",
        step=state.step,
        total_steps=total_steps,
        tokens=state.samples * sequence,
        samples=state.samples,
        global_batch_size=batch,
        loss=step.loss,
        grad_norm=step.grad_norm,
        lr=lr,
        seconds=seconds,
        seconds_left=left / batch * seconds,
        tokens_per_second=speed,
        mfu=speed * flops(convention="full") / at_peak,
        mfu_causal=speed * flops(convention=convention) / at_peak,
        peak_memory_bytes=peak_memory_bytes(run.mesh.device),
        **read_by_source(run, state.samples),
        **timer.ranks.take(),
    )
    for rank, behind, share in timer.ranks.new():
        facts = {"rank": rank, "host": run.mesh.nodes[rank], "seconds": behind, "share": share}
        run.metrics.write("straggler", step=state.step, **facts)


def read_by_source(run: Run, samples: int) -> dict[str, dict[str, float]]:
    """Tokens and epochs that were read of each source of a mixture; nothing without one."""
    source = run.data.train.source
    if not isinstance(source, Mixture):
        return {}
    found, length = source.epochs(run.data.train.place(samples)), run.config.data.sequence_length
    return {
        "source_tokens": {name: read * length for name, (read, _) in found.items()},
        "source_epochs": {name: float(f"{epochs:.6g}") for name, (_, epochs) in found.items()},
    }
