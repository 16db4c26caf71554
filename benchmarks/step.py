"""Time one optimizer step of a config: megallama's engine, a bare torch loop, and transformers, on random ids.

One process on the CPU or on one GPU, no dataset. Forward, backward, clipping and AdamW, with accumulation as the
config says. The contenders take turns, round by round, so that what else the machine does hits all of them.

Example: python benchmarks/step.py configs/110m.yaml train.global_batch_size=16 --steps 20 --rounds 5
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import contenders.steps
import torch
import typer
from contenders.steps import NAMES
from contenders.worker import Build, ContenderError, Round, Worker
from rich.console import Console
from rich.table import Table

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError, refusing
from megallama.hardware.measure import Peak, device_peak, measured_matmul
from megallama.layout.check import check_config
from megallama.layout.counts import count_parameters, flops_per_token
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import pick_device

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3}
"""Relative difference of losses at the same step up to which contenders did the same work."""
COMPARED_STEPS = 10
"""Timed steps whose losses are compared: in longer runs rounding errors grow without anything being wrong."""


@dataclass(frozen=True)
class Settings:
    """How long is measured."""

    steps: int
    """Timed steps of each contender in a round."""
    warmup: int
    """Untimed steps of each contender before its first round."""
    rounds: int
    apart: bool = False
    """Start a contender anew in every round and let it be alone on the device."""
    again: int = 1
    """Untimed steps before every later round."""


@dataclass(frozen=True)
class Score:
    """What one contender reached."""

    rounds: list[Round]
    memory_before_bytes: int

    @property
    def round_medians(self) -> list[float]:
        """Median seconds per step of each round."""
        return [median(round_.seconds) for round_ in self.rounds]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of the seconds of all steps."""
        low, middle, high = quantiles([second for round_ in self.rounds for second in round_.seconds], n=4)
        return low, middle, high

    @property
    def losses(self) -> list[float]:
        """Of all timed steps, in order."""
        return [loss for round_ in self.rounds for loss in round_.losses]


def measure(
    names: Sequence[str],
    config: RunConfig,
    device: torch.device,
    settings: Settings,
    notes: list[str],
    build: Build = contenders.steps.build,
) -> dict[str, Score]:
    """Every contender that could be run; `notes` gets a line for each that could not."""
    workers: dict[str, Worker] = {}
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    before: dict[str, int] = {}
    try:
        for number in range(settings.rounds):
            # Back and forth: a machine that slows down steadily favours no one.
            for name in list(rounds) if number % 2 == 0 else list(reversed(rounds)):
                try:
                    if name not in workers:
                        workers[name] = Worker(build, name, config, device)
                        before[name] = workers[name].memory_before_bytes
                    fresh = settings.apart or number == 0
                    warmup = settings.warmup if fresh else settings.again
                    rounds[name].append(workers[name].run(warmup, settings.steps))
                except ContenderError as error:
                    notes.append(f"{name} is left out: {error}")
                    del rounds[name]
                if name in workers and (settings.apart or name not in rounds):
                    workers.pop(name).stop()
    finally:
        for worker in workers.values():
            worker.stop()
    return {name: Score(rounds[name], before[name]) for name in rounds}


def summary(
    config_path: Path, config: RunConfig, device: torch.device, settings: Settings, scores: dict[str, Score]
) -> dict[str, Any]:
    """All numbers of the report; ratios are of the first contender to each other one."""
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    # The best of three: where the peak is measured, another program must not make it small.
    peak = max((device_peak(device, dtype) for _ in range(3)), key=lambda found: found.flops)
    matmul = peak.flops if peak.source.startswith("measured") else measured_matmul(device, dtype)
    first = next(iter(scores), None)
    return {
        "config": str(config_path),
        "parameters": count_parameters(config.model).total,
        "dtype": config.train.dtype,
        "micro_batch_size": config.train.micro_batch_size,
        "global_batch_size": config.train.global_batch_size,
        "sequence_length": config.data.sequence_length,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        **asdict(settings),
        "peak_flops": peak.flops,
        "peak_source": peak.source,
        "matmul_flops": matmul,
        "contenders": {name: numbers(config, score, peak, matmul) for name, score in scores.items()},
        "ratios": {f"{first}/{name}": ratio(scores[first], scores[name]) for name in scores if first and name != first},
        "loss_difference": loss_difference(list(scores.values())),
        "loss_tolerance": LOSS_TOLERANCE[config.train.dtype],
    }


def numbers(config: RunConfig, score: Score, peak: Peak, matmul: float) -> dict[str, Any]:
    """Of one contender."""
    low, middle, high = score.quartiles
    speed = config.tokens_per_step / middle
    full, causal = (flops_per_token(config.model, config.data.sequence_length, c) for c in ("full", "causal"))
    return {
        "seconds": middle,
        "seconds_iqr": high - low,
        "tokens_per_second": speed,
        "mfu": speed * full / peak.flops,
        "mfu_causal": speed * causal / peak.flops,
        "of_matmul": speed * full / matmul,
        "peak_memory_bytes": max(round_.peak_memory_bytes for round_ in score.rounds),
        "memory_before_bytes": score.memory_before_bytes,
        "first_loss": score.losses[0],
        "last_loss": score.losses[-1],
    }


def ratio(one: Score, other: Score) -> dict[str, Any]:
    """Of time per step, and of the host's processor time, round by round."""
    each = [a / b for a, b in zip(one.round_medians, other.round_medians, strict=True)]
    spent = [a.processor_seconds / b.processor_seconds for a, b in zip(one.rounds, other.rounds, strict=True)]
    return {"median": median(each), "rounds": each, "processor_median": median(spent), "processor_rounds": spent}


def loss_difference(scores: Sequence[Score]) -> float:
    """Largest relative difference between any contender's loss and the first one's at the same early step."""
    early = [score.losses[:COMPARED_STEPS] for score in scores]
    pairs = [pair for other in early[1:] for pair in zip(early[0], other, strict=True)]
    return max((abs(a - b) / abs(a) for a, b in pairs), default=0.0)


def print_report(report: dict[str, Any], notes: Sequence[str]) -> None:
    """The table, and under it what the numbers rest on."""
    # Off a terminal rich takes 80 columns, too few for the table.
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table(
        title=f"{report['config']}: {report['parameters']:,} parameters, {report['dtype']}, "
        f"{report['global_batch_size']} x {report['sequence_length']:,} tokens per step in micro-batches of "
        f"{report['micro_batch_size']}"
    )
    columns = ("contender", "ms/step", "IQR", "tokens/s", "MFU full", "MFU causal", "of matmul", "memory", "last loss")
    for column in columns:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, found in report["contenders"].items():
        table.add_row(
            name,
            f"{1e3 * found['seconds']:.2f}",
            f"{1e3 * found['seconds_iqr']:.2f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['mfu']:.1%}",
            f"{found['mfu_causal']:.1%}",
            f"{found['of_matmul']:.1%}",
            f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{found['last_loss']:.6f}",
        )
    console.print(table)
    for name, found in report["ratios"].items():
        for what, key in (("time", ""), ("processor time", "processor_")):
            rounds = ", ".join(f"{value:.3f}" for value in found[f"{key}rounds"])
            line = f"{what} ratio {name}: {found[f'{key}median']:.3f} (median of the rounds {rounds})"
            console.print(line, highlight=False)
    for line in [*footnotes(report), *notes]:
        console.print(line, highlight=False)


def footnotes(report: dict[str, Any]) -> list[str]:
    """What the columns mean on this device."""
    same = "the same work" if report["loss_difference"] <= report["loss_tolerance"] else "NOT the same work"
    threads = f", threads: {report['threads']}" if report["threads"] else ""
    if report["threads"]:
        held = sorted(round(found["memory_before_bytes"] / 2**20) for found in report["contenders"].values())
        memory = f"most resident in the contender's own process, {held[0]} to {held[-1]} MiB of it before it was built"
    else:
        memory = "most allocated on the device by the contender's own process during timed steps"
    return [
        f"losses of the first {COMPARED_STEPS} steps differ by {report['loss_difference']:.1e} at most: {same}",
        f"100 % MFU: {report['peak_flops'] / 1e12:.3g} TFLOP/s ({report['peak_source']}); a matmul reaches "
        f"{report['matmul_flops'] / 1e12:.3g} TFLOP/s here",
        f"memory: {memory}",
        f"{report['device']}{threads}, torch {report['torch']}; {report['rounds']} rounds of {report['steps']} steps",
    ]


def main(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file of a run; its data is not read.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    steps: Annotated[int, typer.Option(help="Timed steps of each contender in a round.", min=2)] = 10,
    warmup: Annotated[int, typer.Option(help="Untimed steps before the first round.", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="Turns of each contender.", min=3)] = 5,
    chosen: Annotated[str, typer.Option("--contenders", help=f"Comma-separated, from {', '.join(NAMES)}.")] = ",".join(
        NAMES[:3]
    ),
    apart: Annotated[bool, typer.Option("--apart", help="Keep only one contender on the device at a time.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time one optimizer step of a run: megallama's engine, a bare torch loop, and transformers, on random ids.

    Ratios are relative to the first contender. Exit code 1 if a contender fails or losses differ.
    Example: python benchmarks/step.py configs/110m.yaml train.global_batch_size=16 --steps 20
    """
    names = list(dict.fromkeys(chosen.split(",")))
    for name in names:
        if name not in NAMES:
            raise UserError(f"--contenders: {name} is none of {', '.join(NAMES)}")
    config = load_config(config_path, overrides or [])
    check_config(config, 1)
    device = pick_device(config.train.device, 0)
    Launch().prepare(device)
    settings = Settings(steps, warmup, rounds, apart)
    notes: list[str] = []
    if config.train.recompute == "selective":
        notes.append("transformers has no selective recomputation: it keeps all activations")
    scores = measure(names, config, device, settings, notes)
    report = summary(config_path, config, device, settings, scores) | {"notes": notes}
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, notes)
    raise typer.Exit(0 if len(scores) == len(names) and report["loss_difference"] <= report["loss_tolerance"] else 1)


if __name__ == "__main__":
    with refusing():
        typer.run(main)
