"""Step times of published runs against those that a plan predicts: `python benchmarks/published.py`.

`published.yaml` beside this file has the runs. One constant for each GPU and generation of software is fitted to them
and stands in `hardware.yaml`. A run is scored with the constant that the others of its generation give, so that no
error is of a run that was fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megallama.layout.counts import Convention
from megallama.plan.calibration.calibrate import MeasuredStep, fitted_efficiency
from megallama.plan.hardware import Gpu, built_in_hardware
from megallama.plan.time.step_time import step_time_at
from megallama.plan.time.workload import Shape, Workload

# A constant of its own needs so many runs: scored without one, two are left.
FEWEST_RUNS = 3


@dataclass(frozen=True)
class PublishedRun:
    """One run as its source prints it, with what is assumed where the source is silent."""

    name: str
    gpu: Gpu
    software: str
    work: Workload
    measured: float
    """Seconds per step, from the tokens per second or the MFU that the source gives."""
    cite: str
    assumed: str
    held_out: bool
    """No constant is fitted to it."""

    @property
    def generation(self) -> tuple[str, str]:
        """The constant that it shares with others: of which GPU, and of which software."""
        return self.gpu.efficiency_of or self.gpu.key, self.software

    @property
    def tokens(self) -> float:
        """Of one step, per GPU."""
        return self.work.tokens / self.work.world_size


@dataclass(frozen=True)
class Score:
    """A run that the others of its generation predict."""

    run: PublishedRun
    efficiency: float
    """What they were fitted to."""

    @cached_property
    def predicted(self) -> float:
        """Seconds per step."""
        return step_time_at(self.run.work, self.run.gpu, self.efficiency).total

    @property
    def error(self) -> float:
        """Of the predicted step time, as a share of the measured one; above 0 where it predicts too slow a run."""
        return self.predicted / self.run.measured - 1


def published_runs(unprinted: Convention = "full") -> list[PublishedRun]:
    """Every run of `published.yaml`, in its order; `unprinted` is the convention of MFU where the source has none."""
    tree = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    shapes = {name: Shape(**fields) for name, fields in tree["models"].items()}
    hardware = built_in_hardware()
    return [
        _run(row, source, shapes[row["model"]], hardware[source["gpu"]], unprinted)
        for source in tree["sources"]
        for row in source["runs"]
    ]


def with_one_llama(runs: Sequence[PublishedRun]) -> list[PublishedRun]:
    """The same runs, Llama-1 and Llama-2 as one generation of software."""
    return [replace(run, software="llama") if run.software in ("llama-1", "llama-2") else run for run in runs]


def fit(runs: Sequence[PublishedRun]) -> float:
    """The constant of these runs."""
    return fitted_efficiency([MeasuredStep(run.work, run.gpu, run.measured) for run in runs])


def fitted_constants(runs: Sequence[PublishedRun]) -> dict[tuple[str, str], float]:
    """The constant of each (GPU, software) from all of its runs."""
    return {key: fit(group) for key, group in _generations(runs).items()}


def scores(runs: Sequence[PublishedRun]) -> list[Score]:
    """Each run, predicted without itself, or by all of its generation if it is held out."""
    groups = _generations(runs)
    assert all(len(group) >= FEWEST_RUNS for group in groups.values())
    return [Score(run, fit([other for other in groups[run.generation] if other is not run])) for run in runs]


def fitted(found: Sequence[Score]) -> list[Score]:
    """Those whose runs give a constant."""
    return [score for score in found if not score.run.held_out]


def held_out(found: Sequence[Score]) -> list[Score]:
    """Those whose runs give none."""
    return [score for score in found if score.run.held_out]


def table(found: Sequence[Score]) -> str:
    """The scores as Markdown."""
    lines = [
        "| run | GPU, software | tokens/s per GPU | predicted | error of step time |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for score in found:
        run = score.run
        measured, predicted = (run.tokens / seconds for seconds in (run.measured, score.predicted))
        where = f"{run.gpu.key}, {run.software}"
        lines.append(f"| {run.name} | {where} | {measured:,.0f} | {predicted:,.0f} | {score.error:+.1%} |")
    return "\n".join(lines)


def summary(found: Sequence[Score]) -> str:
    """How many are near, in a sentence."""
    errors = [abs(score.error) for score in found]
    within = sum(error <= 0.1 for error in errors)
    mean = sum(errors) / len(errors)
    return f"{within} of {len(errors)} runs within 10 %, the largest error {max(errors):.1%}, the mean {mean:.1%}."


def _run(row: dict[str, Any], source: dict[str, Any], shape: Shape, gpu: Gpu, unprinted: Convention) -> PublishedRun:
    layout = {**source["layout"], **row.get("layout", {})}
    layout["overlapped"] = frozenset(layout.get("overlapped", ()))
    layout["layers_by_rank"] = tuple(layout.get("layers_by_rank", ()))
    work = Workload(shape=shape, **layout)
    rate = row.get("tokens_per_second_per_gpu")
    if rate is None:
        peak = gpu.known("peak_tflops") * 1e12
        rate = row["mfu"] * peak / shape.flops_per_token(work.sequence_length, source.get("convention", unprinted))
    return PublishedRun(
        name=row["run"],
        gpu=gpu,
        software=source["software"],
        work=work,
        measured=work.tokens / work.world_size / rate,
        cite=source["cite"],
        assumed=source["assumed"],
        held_out=source.get("held_out", False),
    )


def _generations(runs: Sequence[PublishedRun]) -> dict[tuple[str, str], list[PublishedRun]]:
    groups: dict[tuple[str, str], list[PublishedRun]] = {}
    for run in runs:
        if not run.held_out:
            groups.setdefault(run.generation, []).append(run)
    return groups


def main() -> None:
    """Print the constants, the errors, what becomes of them with the other convention, and runs that are held out."""
    runs = published_runs()
    for (gpu, software), constant in fitted_constants(runs).items():
        print(f"{gpu} efficiency {software}: {constant:.3f}")
    found = scores(runs)
    print(f"\n{table(fitted(found))}\n\n{summary(fitted(found))}")
    causal = summary(fitted(scores(published_runs("causal"))))
    print(f"With the causal convention where a source prints none: {causal}")
    print(f"With one constant for Llama-1 and Llama-2: {summary(fitted(scores(with_one_llama(runs))))}")
    print(f"\nHeld out:\n\n{table(held_out(found))}")


if __name__ == "__main__":
    main()
