"""What the loop works with: data, this rank's part of the model, the engine around it, and where it writes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megallama.checkpoint.state import TrainState
from megallama.checkpoint.writing.saver import Saver
from megallama.config.deepspeed import deepspeed_config
from megallama.config.schema import RunConfig
from megallama.data.loader import RunData
from megallama.data.mixture import Mixture
from megallama.hardware.measure import Peak, peak_memory_bytes
from megallama.layout.budget import batch_at, samples_at_step, total_steps, with_batch
from megallama.layout.counts import count_parameters, flops_per_token, kernel_convention
from megallama.layout.frozen import frozen_matmul, frozen_weights
from megallama.layout.names import layout_of
from megallama.layout.stages import stages
from megallama.model.attention import attention_of
from megallama.model.init import in_memory
from megallama.model.llama import TensorParallelContext
from megallama.model.stages import ModelStages
from megallama.parallel.mesh import ParallelMesh, sum_losses
from megallama.run_dir.metrics import Metrics
from megallama.run_dir.outcome import Reached, Status
from megallama.train.engine import Engine
from megallama.train.plan_check import device_name, predictions
from megallama.train.spikes import Spikes
from megallama.train.stop_requests import StopRequests
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
    data: RunData
    metrics: Metrics
    saver: Saver
    requests: StopRequests
    watchdog: Watchdog
    reached: Reached
    peak: Peak
    spikes: Spikes | None

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


def build_model(config: RunConfig, mesh: ParallelMesh) -> tuple[ModelStages, Engine]:
    """This rank's part of the model, all zeros, and the engine around it."""
    settings = deepspeed_config(config, mesh.data.size)
    attention = attention_of(config, mesh.axes)
    tp_context = TensorParallelContext(mesh.tp, config.parallel.sequence_parallel, attention=attention)
    with torch.device("meta"):
        model = ModelStages(config.model, stages(config), mesh.pp.rank, tp_context, recompute=config.train.recompute)
    model.freeze(frozen_weights(config.model, config.train.freeze))
    if config.train.compile:
        for layer in model.decoder_layers():
            layer.compile()
    weights = in_memory(model, torch.bfloat16 if config.train.dtype == "bf16" else torch.float32, mesh.device)
    return model, Engine(model, weights, config, mesh, settings)


def build_spikes(config: RunConfig, mesh: ParallelMesh) -> Spikes | None:
    """What finds spikes, if the run looks for them."""
    deviations = config.health.spike_deviations
    return None if deviations is None else Spikes(deviations, config.health.window, mesh.device)


def draw_weights(config: RunConfig, model: ModelStages, engine: Engine, threads: int = 1) -> None:
    """Give the model its initial weights; every rank must call it."""
    shape = config.model
    values = {"num_layers": shape.num_hidden_layers, "scheme": shape.init, "std": shape.initializer_range}
    engine.initialise(model.shard_slices, threads, seed=config.train.seed, **values)


def report_left_out(run: Run) -> None:
    """Say what `data.pack=one` cuts off."""
    config = run.config.data
    splits = {"train": run.data.train, "validation": run.data.validation}
    if run.mesh.rank > 0 or config.pack == "all":
        return
    for name, loader in splits.items():
        tokens, documents, empty = (0, 0, 0) if loader is None else loader.source.left_out
        if tokens:
            kept = f"data.truncate={config.truncate} at data.sequence_length={config.sequence_length}"
            text = f"{kept} leaves {tokens:,} tokens of {documents:,} documents out of the {name} split"
            run.metrics.write("notice", text=text)
        if empty:
            run.metrics.write("notice", text=f"{empty:,} documents of the {name} split have no token, and no sample")


def report_start(run: Run, state: TrainState) -> None:
    """Say what runs, where it begins, and what is predicted of it."""
    if run.mesh.rank > 0:
        return
    here, mesh = with_batch(run.config, batch_at(run.config, state.samples)), run.mesh
    run.metrics.write(
        "start",
        step=state.step,
        ranks=mesh.world.size,
        parameters=count_parameters(here.model).total,
        layout=layout_of(here, mesh.topology.dp).name,
        tokens_per_step=here.tokens_per_step,
        total_steps=run.total_steps(state),
        device=device_name(mesh.device),
        **predictions(here, mesh),
        restarts=run.metrics.restarts,
    )


def write_train_event(
    run: Run, state: TrainState, batch: int, loss: Tensor, grad_norm: float, lr: float, seconds: float
) -> None:
    """Record a step of `batch` sequences that took `seconds`; every rank must call it."""
    config, sequence = run.config, run.config.data.sequence_length
    (total,) = sum_losses([float(loss)], run.mesh)
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
        loss=total / run.mesh.data.size,
        grad_norm=grad_norm,
        lr=lr,
        seconds=seconds,
        seconds_left=left / batch * seconds,
        tokens_per_second=speed,
        mfu=speed * flops(convention="full") / at_peak,
        mfu_causal=speed * flops(convention=convention) / at_peak,
        peak_memory_bytes=peak_memory_bytes(run.mesh.device),
        **read_by_source(run, state.samples),
    )


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
