"""One table of megallama beside what one would take instead, on any machine: `make bench`, or this script.

Rows C1 to C8 run on the CPU, each beside its peers and its floor in the same run; G where there is a GPU.
docs/benchmarks.md says what each row is.

Example: python benchmarks/bench.py --rows C1-fp32,C5 --json bench.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rows import data_parallel, one_process, pipelines, scripts, tensor_parallel
from rows.table import Found, print_table
from step import Settings

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError, refusing
from megallama.parallel.launch import Launch

CONFIG = Path(__file__).with_name("bench.yaml")
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
DEBUG = QUICKSTART.with_name("debug.yaml")
SMALL = (
    *("model.num_hidden_layers=2", "model.hidden_size=64", "model.intermediate_size=192", "model.vocab_size=256"),
    *("model.num_attention_heads=4", "model.max_position_embeddings=64", "data.sequence_length=64"),
)
VERSIONS = ("torch", "deepspeed", "transformers", "megatron-core", "datatrove")


@dataclass(frozen=True)
class Bench:
    """How much is measured."""

    rehearse: bool
    only: tuple[str, ...]
    """Contenders of C1; all if none."""
    gpu_out: Path
    """Where the parts for a GPU leave what they write."""

    def config(self, *overrides: str) -> RunConfig:
        """Of the table's model, or of a small one."""
        return load_config(CONFIG, [*(SMALL if self.rehearse else ()), "train.device=cpu", *overrides])

    def settings(self, steps: int, rounds: int, *, warmup: int = 2, again: int = 0) -> Settings:
        """Of turns, or as few as there can be."""
        return Settings(2, 1, 3, again=again) if self.rehearse else Settings(steps, warmup, rounds, again=again)


def c1(bench: Bench, dtype: str) -> Found:
    only = bench.only or (("engine", "transformers") if bench.rehearse else ())
    config = bench.config(f"train.dtype={dtype}")
    return one_process.training_step(f"C1 {dtype}", config, bench.settings(2, 4, warmup=1), only)


def c2(bench: Bench, vocabulary: int) -> Found:
    size = 512 if bench.rehearse else vocabulary
    config = bench.config(f"model.vocab_size={size}", "train.micro_batch_size=8", "train.global_batch_size=8")
    return one_process.loss_heads(f"C2 {vocabulary // 1024}k", config, bench.settings(1, 3, warmup=1))


def c3(bench: Bench) -> Found:
    config = bench.config("train.micro_batch_size=2", "train.global_batch_size=2")
    return tensor_parallel.row("C3", config, *((2, 2) if bench.rehearse else (2, 4)))


def c4(bench: Bench) -> Found:
    length = () if bench.rehearse else ("data.sequence_length=256",)
    config = bench.config("train.micro_batch_size=1", "train.global_batch_size=1", *length)
    return pipelines.row("C4", config, *(((2, 4), 2) if bench.rehearse else ((2, 4, 8, 16), 5)))


def c5(bench: Bench, accumulation: int, bound: float) -> Found:
    config = bench.config("train.micro_batch_size=1", f"train.global_batch_size={accumulation}")
    settings = bench.settings(max(1, 4 // accumulation), 5)
    return one_process.engine_overhead(f"C5 accumulation {accumulation}", config, settings, bound)


def c5_small(bench: Bench) -> Found:
    """2 x 16 tokens of the quickstart's model: nearly all of a step is what it takes at any size."""
    words = ("data.sequence_length=16", "train.micro_batch_size=2", "train.global_batch_size=2", "train.device=cpu")
    config = load_config(QUICKSTART, words)
    with one_thread():
        settings = bench.settings(50, 7, warmup=5, again=2)
        return one_process.engine_overhead("C5 2 x 16 tokens", config, settings, 1.2, processor=True)


def c5_ranks(bench: Bench) -> Found:
    config = bench.config("train.micro_batch_size=1", "train.global_batch_size=4")
    return data_parallel.row("C5 two ranks", config, *((2, 2) if bench.rehearse else (3, 5)))


def c7(bench: Bench) -> Found:
    return scripts.loader("C7", *((DEBUG, 20, 1, 2) if bench.rehearse else (QUICKSTART, 1000, 20, 7)))


def c8(bench: Bench) -> Found:
    return scripts.checkpoint("C8", CONFIG, SMALL if bench.rehearse else (), 1 if bench.rehearse else 5)


def c6(bench: Bench) -> Found:
    return scripts.data("C6", *((1, 1, "1") if bench.rehearse else (20, 3, "1,2")))


@contextmanager
def one_thread() -> Iterator[None]:
    """Contenders that start inside have one: the processor time of more includes their waiting for each other."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


ROWS: dict[str, Callable[[Bench], Found]] = {
    "C1-fp32": lambda bench: c1(bench, "fp32"),
    "C1-bf16": lambda bench: c1(bench, "bf16"),
    "C2-32k": lambda bench: c2(bench, 32 * 1024),
    "C2-128k": lambda bench: c2(bench, 128 * 1024),
    "C3": c3,
    "C4": c4,
    "C5-8": lambda bench: c5(bench, 8, 1.03),
    "C5-1": lambda bench: c5(bench, 1, 1.06),
    "C5-small": c5_small,
    "C5-ranks": c5_ranks,
    "C6": c6,
    "C7": c7,
    "C8": c8,
    "G": lambda bench: scripts.gpu("G", bench.gpu_out),
}


def chosen(words: Sequence[str]) -> list[str]:
    """The rows that are named, or whose names begin so."""
    for word in words:
        if not any(matches(name, word) for name in ROWS):
            raise UserError(f"--rows: {word} is none of {', '.join(ROWS)}")
    return [name for name in ROWS if not words or any(matches(name, word) for word in words)]


def matches(name: str, word: str) -> bool:
    return name == word or name.startswith(f"{word}-")


def measured(name: str, bench: Bench) -> Found:
    """A row, whose failure leaves the others alone."""
    began = time.perf_counter()
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        found = ROWS[name](bench)
    except Exception as error:
        said = str(error).strip().splitlines()
        found = Found(wrong=[f"failed: {type(error).__name__}: {said[-1] if said else ''}"])
    print(f"{name} took {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    told = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((line.split(": ")[1] for line in told if line.startswith("model name")), platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: installed(name) for name in VERSIONS},
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main(
    rows: Annotated[str, typer.Option(help="Comma-separated, such as C1,C3 or C1-fp32. Default: all.")] = "",
    only: Annotated[str, typer.Option(help="Contenders of C1, comma-separated. Default: all.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Where all numbers go.")] = None,
    gpu_out: Annotated[Path, typer.Option(help="Folder for what the rows of a GPU write.")] = Path("runs/bench-gpu"),
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Small models: times mean nothing.")] = False,
) -> None:
    """Measure rows of the table and print it.

    Exit code 1 if a row fails or contenders do not do the same work. Example: python benchmarks/bench.py --rows C1
    """
    Launch().prepare(torch.device("cpu"))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # ranks that are profiled would say when
    about = machine()
    bench = Bench(rehearse, tuple(filter(None, only.split(","))), gpu_out)
    found = {name: measured(name, bench) for name in chosen(tuple(filter(None, rows.split(","))))}
    print_table(found)
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    if about["load"] > about["cores"] / 2:
        print("other programs were running when this began: ratios of times may be far off")
    if json_path is not None:
        report = {"machine": about, "rehearsal": rehearse, "rows": {name: asdict(row) for name, row in found.items()}}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=1))
    raise typer.Exit(1 if any(row.wrong for row in found.values()) else 0)


if __name__ == "__main__":
    with refusing():
        typer.run(main)
