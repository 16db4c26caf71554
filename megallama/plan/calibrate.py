"""`megallama plan --calibrate RUN`: the steady steps of a run, and the constant that they give, for later plans.

A CPU's own figures are measured first, on the machine that this runs on; that alone imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, prod
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megallama.config.load import load_config, parse_yaml, read_text
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import USER_FILE, Gpu, gpu_of_driver, load_hardware
from megallama.layout.budget import with_batch
from megallama.plan.report.table import Part, Row
from megallama.plan.report.time import check_type
from megallama.plan.time.kernels import SWIGLU_ELEMENTS
from megallama.plan.time.software import Machine, Software, find_software
from megallama.plan.time.step_time import step_time
from megallama.run_dir.events import METRICS
from megallama.run_dir.steady import SETTLING, read_timed, steady_seconds
from megallama.system.lock import beside, output_lock
from megallama.system.whole_file import put

LEAST_EVENTS = 5
"""Fewer say nothing of what is usual."""
SOFTWARE = "calibrated"
"""The generation of software under which the constant is written."""
_LOWEST = 1e-3
Figures = dict[str, Any]


class Environment(BaseModel):
    """Of environment.json, what a calibration needs."""

    model_config = ConfigDict(frozen=True, strict=True)

    topology: dict[str, Annotated[int, Field(ge=1)]] = Field(min_length=1)
    device: str
    """By its driver's name, or cpu."""
    threads: int = Field(ge=1)
    """The threads of each rank, on a CPU."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return prod(self.topology.values())


@dataclass(frozen=True)
class MeasuredRun:
    """The last start of a run."""

    config: RunConfig
    environment: Environment
    seconds: tuple[float, ...]
    """Per step, of each `train` event in which nothing but training went on."""

    @property
    def step_seconds(self) -> float:
        """The median."""
        return median(self.seconds)


def read_run(folder: Path) -> MeasuredRun:
    """The run in `folder`; UserError if there is none, or if its last start had too few steps."""
    for name in ("config.yaml", "environment.json", METRICS):
        if not (folder / name).is_file():
            raise UserError(f"--calibrate={folder} is no run, for it has no {name}; give the run.dir of one")
    config = load_config(folder / "config.yaml")
    if config.train.freeze:
        raise UserError(f"--calibrate={folder} froze weights, so its steps are shorter than others; give another run")
    try:
        environment = Environment.model_validate_json((folder / "environment.json").read_bytes())
    except ValidationError as error:
        why = error.errors(include_url=False)[0]
        where = f"{'.'.join(map(str, why['loc']))}: {why['msg']}".removeprefix(": ")
        raise UserError(
            f"{folder}/environment.json is not what a run of this version writes ({where}); train again"
        ) from None
    events = read_timed(folder / METRICS)
    batch = next((e["global_batch_size"] for e in reversed(events) if "global_batch_size" in e), None)
    if config.train.batch_ramp and type(batch) is int:  # steps of one batch alone are those of one plan
        config = with_batch(config, batch)
        events = [e for e in events if e["event"] != "train" or e.get("global_batch_size") == batch]
    seconds = steady_seconds(events, config.logging.every)
    if len(seconds) < LEAST_EVENTS:
        raise UserError(
            f"--calibrate={folder} has {len(seconds)} train events of steady steps, and {LEAST_EVENTS} are needed; "
            f"train {SETTLING + (LEAST_EVENTS + 1) * config.logging.every} steps, without a save between"
        )
    return MeasuredRun(config, environment, tuple(seconds))


@dataclass(frozen=True)
class MeasuredStep:
    """A step and the seconds that it took."""

    config: RunConfig
    world_size: int
    gpu: Gpu
    software: Software
    seconds: float


def fitted_efficiency(steps: Sequence[MeasuredStep]) -> float:
    """The share of the peak at which predicted over measured seconds are 1 in the geometric mean.

    UserError if that is not between 0.001 and 1: steps were faster than at the peak, or hardly moved.
    """
    if _excess(steps, 1.0) > 0 or _excess(steps, _LOWEST) < 0:
        seconds = ", ".join(f"{step.seconds:.4g}" for step in steps)
        raise UserError(f"steps of {seconds} s fit no efficiency from {_LOWEST:g} to 1; check the peak and the links")
    low, high = _LOWEST, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _excess(steps, middle) > 0 else (low, middle)
    return low


def _excess(steps: Sequence[MeasuredStep], efficiency: float) -> float:
    """Above 0 where predicted steps are too slow; falls as the efficiency rises."""
    return sum(
        log(step_time(step.config, step.world_size, Machine(step.gpu, step.software, efficiency)).total / step.seconds)
        for step in steps
    )


def calibrate(folder: Path, hardware: Path | None = None) -> list[Part]:
    """Fit the efficiency to the run in `folder` and write it to `hardware`, by default the user's own file.

    UserError if there is no such run, if it has too few steps, or if nobody knows what its device can do.
    """
    run = read_run(folder)
    file = USER_FILE.expanduser() if hardware is None else hardware
    device = run.environment.device
    gpu = gpu_of_driver(device, load_hardware(hardware if hardware and hardware.exists() else None))
    if gpu is None:
        raise UserError(
            f"--calibrate={folder} ran on {device}, which no GPU that is known is called by its driver; "
            f"give one with this driver_name in {file}"
        )
    check_type(run.config, gpu)
    with output_lock(beside(file), f"--hardware={file}", "--hardware"):
        figures: Figures = {}
        if gpu.kind == "cpu":
            from megallama.hardware.measure import measure_cpu  # imports torch, which nothing else here does

            figures = measure_cpu(run.config.train.dtype, run.environment.threads, SWIGLU_ELEMENTS)
        measured = gpu.model_copy(update=figures)
        step = MeasuredStep(run.config, run.environment.world_size, measured, find_software(measured), run.step_seconds)
        efficiency = float(f"{fitted_efficiency([step]):.4g}")
        lay_down(file, gpu.key, figures, efficiency)
    return [_part(folder, run, gpu, figures, efficiency, file)]


def lay_down(file: Path, key: str, figures: Mapping[str, Any], efficiency: float) -> None:
    """Write figures and constant of one accelerator into `file`, the constant first, and keep all else that it has.

    YAML is written anew, without comments: a file that has some stays beside it as FILE.bak. UserError if it cannot be
    written.
    """
    text = read_text(file) if file.exists() else ""
    tree: Figures = parse_yaml(text, str(file)) or {}
    entry = tree.get(key) or {}
    constants = {name: value for name, value in (entry.get("efficiency") or {}).items() if name != SOFTWARE}
    tree[key] = {**entry, **figures, "efficiency": {SOFTWARE: efficiency, **constants}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if "#" in text:
            put(file.with_name(f"{file.name}.bak"), text.encode())
        put(file, yaml.safe_dump(tree, sort_keys=False).encode())
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); give another by --hardware FILE") from None


def _part(folder: Path, run: MeasuredRun, gpu: Gpu, figures: Mapping[str, Any], efficiency: float, file: Path) -> Part:
    how = f"median of {len(run.seconds)} train events of {folder}"
    rows = [Row("seconds", "step time", how, run.step_seconds, "s")]
    rows += [Row(name, name, "measured here", value) for name, value in figures.items() if not isinstance(value, str)]
    share = f"of {figures.get('peak_tflops', gpu.peak_tflops)} TFLOP/s, at which a plan gives this step time"
    rows.append(Row("efficiency", "efficiency", share, efficiency))
    note = f"Written to {file} as {gpu.key}.efficiency.{SOFTWARE}, the first of its constants and so the default."
    return Part("calibration", f"Calibration of {gpu.key}", tuple(rows), note)
