"""Predicted step times on this machine's CPU against real runs: calibrated on one shape, tested on five others.

Each run is `launch/pretrain.py` with one rank of one thread, and `megallama plan --calibrate` does what this does. The
shapes take turns, round by round, and of each the fastest run counts. The machine must have nothing else to do.

Example: python benchmarks/plan.py --steps 12 --rounds 2
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megallama.corpus.building.build import build_dataset
from megallama.errors import refusing
from megallama.hardware.gpus import Gpu, load_hardware
from megallama.layout.counts import count_parameters
from megallama.plan.calibrate import LEAST_EVENTS, MeasuredRun, calibrate, read_run
from megallama.plan.time.software import find_software, machine
from megallama.plan.time.step_time import step_time
from megallama.run_dir.steady import SETTLING

ROOT = Path(__file__).parents[1]
MOST = 0.15
"""Error that a prediction may have."""


@dataclass(frozen=True)
class Shape:
    """A model and its batch, in heads of one size and in sequences of one length."""

    name: str
    heads: int = 6
    kv_heads: int = 6
    layers: int = 6
    vocab: int = 4096
    length: int = 1
    """Of a sequence, in the shortest of all."""
    micro_batch: int = 4
    recompute: str = "none"


CALIBRATED = Shape("calibrated")
OTHERS = (
    Shape("wide, fewer layers", heads=12, kv_heads=4, layers=4),
    Shape("narrow, more layers", heads=4, kv_heads=4, layers=14),
    Shape("long sequences", length=4, micro_batch=1),
    Shape("large vocabulary", vocab=16384, layers=3),
    Shape("recomputing", recompute="full"),
)


@dataclass(frozen=True)
class Score:
    """Seconds of a step of one shape."""

    name: str
    parameters: int
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Above 0 where the prediction is too slow."""
        return self.predicted / self.measured - 1


def train(shape: Shape, head_size: int, sequence: int, steps: int, corpus: Path, run_dir: Path) -> None:
    """A run with as many tokens a step as any other, which saves at its end only."""
    hidden, length = shape.heads * head_size, shape.length * sequence
    overrides = {
        "run.dir": run_dir,
        "data.path": corpus,
        "data.validation_fraction": 0,
        "data.sequence_length": length,
        "model.hidden_size": hidden,
        "model.intermediate_size": 8 * hidden // 3,
        "model.num_hidden_layers": shape.layers,
        "model.num_attention_heads": shape.heads,
        "model.num_key_value_heads": shape.kv_heads,
        "model.vocab_size": shape.vocab,
        "model.max_position_embeddings": length,
        "train.device": "cpu",
        "train.steps": steps,
        "train.micro_batch_size": shape.micro_batch,
        "train.global_batch_size": 4 // shape.length,
        "train.recompute": shape.recompute,
        "evaluation.every": 0,
        "checkpoint.every": 0,
    }
    words = [f"{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(ROOT / "configs" / "debug.yaml")]
    # One thread, as torchrun gives a rank: two wait for each other in every kernel for what else a machine does, which
    # makes steps of many small kernels a third longer, or not.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)


def measure(shapes: Sequence[Shape], head_size: int, sequence: int, steps: int, rounds: int) -> list[Score]:
    """Train all shapes in turn, round by round; the first shape calibrates and is predicted exactly."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        text = [json.dumps({"text": f"{number} " * 200}) for number in range(1000)]
        (folder / "text.jsonl").write_text("\n".join(text))
        build_dataset([str(folder / "text.jsonl")], str(folder / "corpus"), "bytes", workers=1)
        for number in range(rounds):
            for shape in shapes:
                print(f"round {number + 1}: {shape.name} ...", file=sys.stderr)
                train(shape, head_size, sequence, steps, folder / "corpus", folder / f"{shape.name}-{number}")
        fastest = [fastest_run([folder / f"{shape.name}-{number}" for number in range(rounds)]) for shape in shapes]
        calibrate(fastest[0], folder / "hardware.yaml")
        cpu = load_hardware(folder / "hardware.yaml")["cpu"]
        return [score(shape.name, read_run(run), cpu) for shape, run in zip(shapes, fastest, strict=True)]


def fastest_run(folders: Sequence[Path]) -> Path:
    """The run with the shortest steps: what else the machine does only adds to them."""
    return min(folders, key=lambda folder: read_run(folder).step_seconds)


def score(name: str, run: MeasuredRun, cpu: Gpu) -> Score:
    """A run beside its prediction."""
    predicted = step_time(run.config, 1, machine(cpu, find_software(cpu, "calibrated"))).total
    return Score(name, count_parameters(run.config.model).total, run.step_seconds, predicted)


def print_report(report: dict[str, Any]) -> None:
    """A row for each shape."""
    taken = f"{report['rounds']} rounds of {report['steps']} steps"
    table = Table(title=f"{report['cores']} cores, load {report['load']:.1f} before, {taken}")
    table.add_column("shape")
    for head in ("parameters", "measured s", "predicted s", "error"):
        table.add_column(head, justify="right")
    for row in report["shapes"]:
        seconds = (f"{row['measured']:.3f}", f"{row['predicted']:.3f}", f"{row['error']:+.1%}")
        table.add_row(row["name"], f"{row['parameters']:,}", *seconds)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main(
    steps: Annotated[int, typer.Option(help="Steps of each run.", min=SETTLING + LEAST_EVENTS + 1)] = 12,
    rounds: Annotated[int, typer.Option(help="Runs of each shape, in turn; the fastest counts.", min=1)] = 2,
    head_size: Annotated[int, typer.Option(help="Head size; all widths are proportional to it.", min=8)] = 64,
    sequence: Annotated[int, typer.Option(help="Sequence length of most shapes.", min=16)] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Calibrate on one shape, predict five others. Exit code 1 if any prediction is off by more than 15 %."""
    load = os.getloadavg()[0]
    scores = measure([CALIBRATED, *OTHERS], head_size, sequence, steps, rounds)
    rows = [{**asdict(score), "error": score.error} for score in scores]
    report = {"cores": len(os.sched_getaffinity(0)), "load": load, "rounds": rounds, "steps": steps, "shapes": rows}
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    raise typer.Exit(0 if all(abs(score.error) <= MOST for score in scores[1:]) else 1)


if __name__ == "__main__":
    with refusing():
        typer.run(main)
