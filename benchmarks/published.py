"""Step times of published runs against those that a plan predicts: `python benchmarks/published.py`.

`published.yaml` beside this file has the runs, each as the words with which `megallama plan` predicts it; `--commands`
prints them. The constants that the plan takes from hardware.yaml are fitted to the runs marked as such (`--fit` prints
them anew); the score of the others stands apart.
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.hardware.gpus import Gpu, built_in_hardware
from megallama.layout.counts import Convention, flops_per_token
from megallama.plan.calibrate import MeasuredStep, fitted_efficiency
from megallama.plan.time.software import find_software, known_software, machine
from megallama.plan.time.step_time import step_time

FEWEST_RUNS = 3
GROWN = ("megatron-2024",)
"""Software of which the runs are of a model that grows with the GPUs."""
HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "7b.yaml"
"""Every key of it that a step time depends on is given anew."""


@dataclass(frozen=True)
class PublishedRun:
    """One run as its source prints it, with what is assumed where the source is silent."""

    name: str
    model: str
    gpu: Gpu
    gpus: int
    software: str
    words: tuple[str, ...]
    rate: float | None
    """Tokens per second and GPU, as the source prints them."""
    mfu: float | None
    """The source's, where it prints no rate."""
    convention: Convention
    """That of the MFU."""
    fitted: bool
    """The constant is fitted to it."""

    @cached_property
    def config(self) -> RunConfig:
        """The run as training would read it."""
        return load_config(CONFIG, self.words)

    @cached_property
    def measured(self) -> float:
        """Tokens per second and GPU."""
        if self.rate is not None:
            return self.rate
        assert self.mfu is not None
        flops = flops_per_token(self.config.model, self.config.data.sequence_length, self.convention)
        return self.mfu * self.gpu.known("peak_tflops") * 1e12 / flops

    @cached_property
    def predicted(self) -> float:
        """Tokens per second and GPU of the plan."""
        on = machine(self.gpu, find_software(self.gpu, self.software))
        return self.config.tokens_per_step / step_time(self.config, self.gpus, on).total / self.gpus

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: as published, and as predicted."""
        tokens = self.config.tokens_per_step / self.gpus
        return tokens / self.measured, tokens / self.predicted

    @property
    def error(self) -> float:
        """Of the predicted step time, as a share of the measured one; above 0 where it predicts too slow a run."""
        return self.measured / self.predicted - 1

    @property
    def command(self) -> str:
        """What plans it."""
        words = shlex.join(self.words)
        return (
            f"megallama plan configs/7b.yaml {words} --gpus {self.gpus} --gpu {self.gpu.key} --software {self.software}"
        )

    @property
    def generation(self) -> str:
        """The software's, whose constant it shares with others."""
        software = known_software()[self.software]
        return software.generation or software.name


def published_runs(unprinted: Convention = "full") -> list[PublishedRun]:
    """Every run of `published.yaml`, in its order; `unprinted` is the convention of MFU where the source has none."""
    tree = yaml.safe_load((HERE / "published.yaml").read_text(encoding="utf-8"))
    hardware = built_in_hardware()
    return [_run(tree, row, source, hardware, unprinted) for source in tree["sources"] for row in source["runs"]]


def _run(
    tree: dict[str, Any], row: dict[str, Any], source: dict[str, Any], hardware: dict[str, Gpu], unprinted: Convention
) -> PublishedRun:
    words = " ".join([tree["base"], tree["models"][row["model"]], row["words"]])
    return PublishedRun(
        name=row["run"],
        model=row["model"],
        gpu=hardware[source["gpu"]],
        gpus=row["gpus"],
        software=source["software"],
        words=tuple(words.split()),
        rate=row.get("tokens_per_second_per_gpu"),
        mfu=row.get("mfu"),
        convention=source.get("convention", unprinted),
        fitted=source["fitted"],
    )


def fitted_constants(runs: Sequence[PublishedRun]) -> dict[tuple[str, str], float]:
    """The constant of each GPU and generation of software from the runs that are marked for it.

    A GPU with fewer than three of its own goes with the one that has the same chip.
    """
    marked = [run for run in runs if run.fitted]
    own = Counter((run.gpu.key, run.generation) for run in marked)
    groups: dict[tuple[str, str], list[MeasuredStep]] = {}
    for run in marked:
        few = own[run.gpu.key, run.generation] < FEWEST_RUNS
        key = (run.gpu.efficiency_of or run.gpu.key) if few else run.gpu.key
        seconds = run.config.tokens_per_step / run.gpus / run.measured
        step = MeasuredStep(run.config, run.gpus, run.gpu, known_software()[run.software], seconds)
        groups.setdefault((key, run.generation), []).append(step)
    return {key: fitted_efficiency(steps) for key, steps in groups.items()}


def table(runs: Sequence[PublishedRun]) -> str:
    """The runs as Markdown."""
    lines = [
        "| run | GPU, software | tokens/s per GPU | predicted | error of step time |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for run in runs:
        where = f"{run.gpu.key}, {run.software}"
        lines.append(f"| {run.name} | {where} | {run.measured:,.0f} | {run.predicted:,.0f} | {run.error:+.1%} |")
    return "\n".join(lines)


def growing(runs: Sequence[PublishedRun]) -> list[list[PublishedRun]]:
    """Runs that differ in the number of GPUs, by that number: of one model at one sequence length, or of GROWN."""
    found: dict[tuple[object, ...], list[PublishedRun]] = {}
    for run in runs:
        same = () if run.software in GROWN else (run.model, run.config.parallel.tensor, run.config.train.compile)
        found.setdefault((run.gpu.key, run.software, run.config.data.sequence_length, *same), []).append(run)
    families = [sorted(family, key=lambda run: run.gpus) for family in found.values()]
    return [family for family in families if len({run.gpus for run in family}) > 1]


def growth_table(families: Sequence[Sequence[PublishedRun]]) -> str:
    """Step times against the number of GPUs, as Markdown."""
    lines = [
        "| run | software | GPUs | step, published s | predicted s | per GPU, of the fewest: published | predicted |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for family in families:
        first = family[0]
        for run in family:
            published, predicted = run.seconds
            same = run.model == first.model
            shares = (
                [f"{run.measured / first.measured:.2f}", f"{run.predicted / first.predicted:.2f}"] if same else ["", ""]
            )
            cells = [run.name, run.software, f"{run.gpus:,}", f"{published:.3g}", f"{predicted:.3g}", *shares]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(runs: Sequence[PublishedRun]) -> str:
    """How many are near, in a sentence."""
    errors = [abs(run.error) for run in runs]
    within = sum(error <= 0.1 for error in errors)
    share, mean = within / len(errors), sum(errors) / len(errors)
    return (
        f"{within} of {len(errors)} runs ({share:.0%}) within 10 %, the largest {max(errors):.1%}, the mean {mean:.1%}"
    )


def main() -> None:
    """Print every run with its error, and how many are near: by software, of those that were not fitted, of all."""
    parser = argparse.ArgumentParser(description="Compare published step times with predictions.")
    parser.add_argument("--commands", action="store_true", help="print the command that plans each run")
    parser.add_argument("--fit", action="store_true", help="print the efficiencies fitted to the marked runs")
    parser.add_argument("--growth", action="store_true", help="print step times against the number of GPUs")
    arguments = parser.parse_args()
    runs = published_runs()
    if arguments.growth:
        print(growth_table(growing(runs)))
        return
    if arguments.commands:
        print("\n".join(run.command for run in runs))
        return
    if arguments.fit:
        for (gpu, software), constant in fitted_constants(runs).items():
            print(f"{gpu} efficiency {software}: {constant:.3f}")
        return
    print(table(runs))
    for software in dict.fromkeys(run.software for run in runs):
        print(f"\n{software}: {summary([run for run in runs if run.software == software])}")
    print(f"\nfitted: {summary([run for run in runs if run.fitted])}")
    print(f"\nnot fitted: {summary([run for run in runs if not run.fitted])}")
    print(f"\nall: {summary(runs)}")


if __name__ == "__main__":
    main()
