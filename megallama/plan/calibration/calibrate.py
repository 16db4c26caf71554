"""`megallama plan --calibrate RUN`: the constant that the steps of a run give, into a file that later plans use.

A CPU's own figures are measured first, on the machine that this runs on; that alone imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megallama.config.load import parse_yaml, read_text
from megallama.errors import UserError
from megallama.plan.calibration.calibration import MeasuredStep, fitted_efficiency
from megallama.plan.calibration.measured import MeasuredRun, read_run
from megallama.plan.hardware import USER_FILE, Gpu, gpu_of_driver, load_hardware
from megallama.plan.report.table import Part, Row
from megallama.plan.report.time import check_type
from megallama.plan.time.workload import workload
from megallama.system.lock import beside, output_lock
from megallama.system.whole_file import put

SOFTWARE = "calibrated"
"""The generation of software under which the constant is written."""

Figures = dict[str, Any]


def calibrate(folder: Path, hardware: Path | None = None) -> list[Part]:
    """Fit the efficiency to the run in `folder` and write it to `hardware`, by default the user's own file.

    UserError if there is no such run, if it has too few steps, or if nobody knows what its device can do.
    """
    run = read_run(folder)
    file = USER_FILE.expanduser() if hardware is None else hardware
    gpu = gpu_of_driver(run.device, load_hardware(hardware if hardware and hardware.exists() else None))
    if gpu is None:
        raise UserError(
            f"--calibrate={folder} ran on {run.device}, which no GPU that is known is called by its driver; "
            f"give one with this driver_name in {file}"
        )
    check_type(run.config, gpu)
    with output_lock(beside(file), f"--hardware={file}", "--hardware"):
        figures = _measured_cpu(run) if gpu.kind == "cpu" else {}
        step = MeasuredStep(workload(run.config, run.world_size), gpu.model_copy(update=figures), run.step_seconds)
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


def _measured_cpu(run: MeasuredRun) -> Figures:
    # Imports torch, which nothing else here does.
    from megallama.plan.calibration.cpu_figures import measure_cpu

    return measure_cpu(run.config.train.dtype, run.threads)


def _part(folder: Path, run: MeasuredRun, gpu: Gpu, figures: Mapping[str, Any], efficiency: float, file: Path) -> Part:
    how = f"median of {len(run.seconds)} train events of {folder}"
    rows = [Row("seconds", "step time", how, run.step_seconds, "s")]
    rows += [Row(name, name, "measured here", value) for name, value in figures.items() if not isinstance(value, str)]
    share = f"of {figures.get('peak_tflops', gpu.peak_tflops)} TFLOP/s, at which a plan gives this step time"
    rows.append(Row("efficiency", "efficiency", share, efficiency))
    note = f"Written to {file} as {gpu.key}.efficiency.{SOFTWARE}, the first of its constants and so the default."
    return Part("calibration", f"Calibration of {gpu.key}", tuple(rows), note)
