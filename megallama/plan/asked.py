"""The words of `megallama plan` as they were typed, and the numbers that they are. Imports no schema and no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from megallama.config.numbers import number
from megallama.errors import UserError, check_printable

_FEWEST = 1000
"""Parameters or tokens of anything that is trained."""
_LEAST_FLOPS = 6.0 * _FEWEST**2
# Far beyond any run, and near enough that no power of it leaves the range of a float.
_LARGEST = 1e30


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The words of the command line."""

    config_path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Config file of a run.")] = None
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None
    gpus: Annotated[str | None, typer.Option(help="Number of GPUs. Default: one copy of the model.")] = None
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU, such as h100: adds fit, step time and cost.")] = None
    price: Annotated[str | None, typer.Option(help="Price per GPU-hour: adds the cost of the run.")] = None
    mfu: Annotated[str | None, typer.Option(help="MFU to assume instead of predicting the step time.")] = None
    software: Annotated[str | None, typer.Option(help="Software to predict the speed of. Default: megallama.")] = None
    hardware: Annotated[Path | None, typer.Option(help="YAML file that adds GPUs or changes their figures.")] = None
    tokens: Annotated[str | None, typer.Option(help="Training tokens, such as 2e12 or 2T.")] = None
    flops: Annotated[str | None, typer.Option(help="Training FLOPs, such as 1e21: finds the best model.")] = None
    params: Annotated[str | None, typer.Option(help="Parameters, such as 7B: finds the best number of tokens.")] = None
    tokens_per_param: Annotated[
        str | None, typer.Option(help="Tokens per parameter. Default: the compute-optimal ratio.")
    ] = None
    days: Annotated[str | None, typer.Option(help="With --gpus and --gpu: budget in days.")] = None
    vocab: Annotated[str | None, typer.Option(help="Vocabulary size of the model to find. Default: 32000.")] = None
    search: Annotated[bool, typer.Option("--search", help="Rank every legal layout by predicted step time.")] = False
    write: Annotated[Path | None, typer.Option(help="With --search: write the best layout as a config.")] = None
    sbatch: Annotated[Path | None, typer.Option(help="With --write: write a Slurm job file for it.")] = None
    timeline: Annotated[bool, typer.Option("--timeline", help="Draw a timeline of the pipeline ranks.")] = False
    plot: Annotated[Path | None, typer.Option(help="Draw the memory of each rank: .png, .svg or .pdf.")] = None
    check: Annotated[bool, typer.Option("--check", help="Compare with a rank's real stages on fake tensors.")] = False
    rank: Annotated[str | None, typer.Option(help="With --check: which rank. Default: the last.")] = None
    calibrate: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Fit predictions to the measured steps of this run directory.")
    ] = None
    explain: Annotated[bool, typer.Option("--explain", help="Print every figure with its arithmetic.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False

    @property
    def given(self) -> list[str]:
        """The names of the words that were typed."""
        return [each.name for each in fields(self) if getattr(self, each.name) not in (None, False)]

    @property
    def mode(self) -> str:
        """What is asked: a key of `TAKEN`."""
        modes = (name for name in TAKEN if name in self.given)
        return next(modes, "size" if self.config_path is None else "run")

    def typed(self, name: str) -> str:
        """The word as it was typed."""
        value, option = getattr(self, name), f"--{name.removeprefix('as_').replace('_', '-')}"
        return str(value) if name == "config_path" else option if value is True else f"{option}={value}"

    def check_words(self) -> None:
        """UserError for words that do not go together, or have no say in what is asked."""
        mode, given = self.mode, self.given
        for name, needed, example in NEEDED:
            there = needed in given or (name, mode) == ("hardware", "calibrate")
            if name in given and not there and (name in TAKEN[mode] or needed in TAKEN):
                raise UserError(f"{self.typed(name)} needs --{needed}; add {example}, or leave it out")
        for name in given:
            if name != mode and name not in TAKEN[mode]:
                if mode == "size":
                    raise UserError(f"{self.typed(name)} needs a CONFIG such as configs/7b.yaml; give one")
                asked = self.typed("config_path" if mode == "run" else mode)
                raise UserError(f"{asked} does not go with {self.typed(name)}; leave one of them out")
        if mode not in ("calibrate", "size") and self.config_path is None:
            raise UserError(f"{self.typed(mode)} needs a CONFIG such as configs/7b.yaml; give one")
        if self.software is not None and self.mfu is not None:
            raise UserError(f"--mfu={self.mfu} leaves --software={self.software} no say; leave one of them out")
        for name in ("write", "sbatch", "plot"):
            check_printable(f"--{name}", str(getattr(self, name) or ""))

    def assumed_mfu(self) -> float | None:
        """The utilisation that takes the place of what is predicted."""
        return None if self.mfu is None else number("--mfu", self.mfu, 0.01, 1, "0.4")

    def money_per_hour(self) -> float | None:
        """The price of one GPU, None where none was typed."""
        return None if self.price is None else number("--price", self.price, 0, 1e9, "2.5")

    def length(self) -> float | None:
        """Tokens."""
        return amount("--tokens", self.tokens, "2e12 or 2T")


_RUN = {"config_path", "overrides", "gpus"}
_SIZE = {"flops", "params", "tokens", "tokens_per_param", "gpus", "days", "vocab"}
TAKEN = {
    "calibrate": {"hardware", "as_json"},
    "timeline": _RUN,
    "check": {*_RUN, "rank"},
    "search": {*_RUN, "gpu", "price", "mfu", "software", "hardware", "tokens", "write", "sbatch", "explain", "as_json"},
    "plot": {*_RUN, "gpu", "hardware"},
    "run": {*_RUN, "gpu", "price", "mfu", "software", "hardware", "tokens", "explain", "as_json"},
    "size": {*_SIZE, "gpu", "price", "mfu", "hardware", "as_json"},
}
"""What each thing that can be asked has a use for."""
NEEDED = (
    ("rank", "check", "--check"),
    ("sbatch", "write", "--write run.yaml"),
    ("write", "search", "--search"),
    ("days", "gpus", "--gpus 64"),
    *((name, "gpu", "--gpu h100") for name in ("days", "price", "mfu", "software", "hardware")),
)
"""A word, the one that it needs, and an example of that."""


def amount(option: str, text: str | None, example: str) -> float | None:
    """A number from 1 to 1e30, None for none; UserError for anything else, and where its B or T was forgotten."""
    if text is None:
        return None
    found = number(option, text, _LEAST_FLOPS if option == "--flops" else 1, _LARGEST, example)
    unit = example[-1]
    if found < _FEWEST and unit in "BT":
        raise UserError(f"{option}={text} is {found:g}, fewer than any model has; did you mean {text}{unit}?")
    return found
