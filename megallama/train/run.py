"""What the loop works with: data, this rank's part of the model, the engine around it, and where it writes."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megallama.checkpoint.state import TrainState
from megallama.checkpoint.writing.saver import Saver
from megallama.config.deepspeed import deepspeed_config
from megallama.config.schema import RunConfig
from megallama.data.loader import RunData
from megallama.hardware.compiler import can_compile, needed_to_compile
from megallama.hardware.measure import Peak
from megallama.layout.budget import batch_at, total_steps, with_batch
from megallama.layout.compiled import compiles, compiles_layers
from megallama.layout.counts import count_parameters
from megallama.layout.frozen import frozen_weights
from megallama.layout.names import layout_of
from megallama.layout.stages import stages
from megallama.model.init import in_memory
from megallama.model.llama import TensorParallelContext
from megallama.model.stages import ModelStages
from megallama.parallel.mesh import ParallelMesh
from megallama.run_dir.metrics import Metrics
from megallama.run_dir.outcome import Reached, Status
from megallama.train.engine import Engine
from megallama.train.plan_check import device_name, predictions
from megallama.train.spikes import Spikes
from megallama.train.stop_requests import StopRequests
from megallama.train.watchdog import Watchdog

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h: free memory at the end of the heap that goes back, and how many blocks may lie outside of it."""


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
    if mesh.device.type == "cpu":
        keep_freed_memory()
    with torch.device("meta"):
        model = ModelStages(
            config.model,
            stages(config),
            mesh.pp.rank,
            TensorParallelContext.of(config, mesh.axes),
            recompute=config.train.recompute,
            z_loss=config.optimizer.z_loss,
        )
    model.freeze(frozen_weights(config.model, config.train.freeze))
    if config.train.matmul != "dtype":
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it misses kernels that are not used here
        from megallama.model.fp8 import Fp8Matmuls

        matmuls = Fp8Matmuls(emulated=config.train.matmul == "fp8_emulated")
        for stage in model.models:
            stage.multiply_by(matmuls)
    compile_parts(model, config, mesh)
    weights = in_memory(model, torch.bfloat16 if config.train.dtype == "bf16" else torch.float32, mesh.device)
    return model, Engine(model, weights, config, mesh, settings)


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next, as torch does on a GPU.

    Else large tensors go back to the system, which fills each page with zeros as it is touched again: 3 to 5 % of a
    step. Only glibc has these settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def compile_parts(model: ModelStages, config: RunConfig, mesh: ParallelMesh) -> None:
    """Mark for torch's compiler what the run wants compiled, or nothing where a rank lacks what it needs.

    Copies of a weight on ranks of which some are compiled would drift apart.
    """
    on_gpu = mesh.device.type == "cuda"
    if not compiles(config, on_gpu):
        return
    lacking = torch.tensor(not can_compile(on_gpu), dtype=torch.int32, device=mesh.device)
    if mesh.world.size > 1:
        dist.all_reduce(lacking, group=mesh.world.group)
    if not lacking:
        model.compile_parts(layers=compiles_layers(config, on_gpu))


def report_uncompiled(run: Run) -> None:
    """Say that a GPU works without a compiler, where one was wanted."""
    on_gpu = run.mesh.device.type == "cuda"
    if compiles(run.config, on_gpu) and not run.model.compiled:
        text = f"nothing is compiled, and steps take longer: a node lacks some of {needed_to_compile(on_gpu)}"
        run.metrics.write("notice", text=text)


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
