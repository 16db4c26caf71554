"""`megallama plan`: what a run costs, before any of it is spent. Imports no torch, so it answers at once."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from megallama.errors import UserError, check_printable
from megallama.plan.report.sizing import compared, optimum, plan_sizing, repetition
from megallama.plan.report.table import Part, render, with_notes
from megallama.plan.sizing.flags import Flags, amount, count, number, read_flags

if TYPE_CHECKING:
    from megallama.config.schema import RunConfig
    from megallama.plan.hardware import Gpu
    from megallama.plan.time.software import Machine, Software

# The schema takes a quarter of a second to import, which sizing need not wait for: hence the imports in functions.


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The words of the command line, each as it was typed."""

    config_path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML of a run.")] = None
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None
    gpus: Annotated[str | None, typer.Option(help="Number of GPUs. Default: one copy of the model.")] = None
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU, as h100: adds fit, step time and cost.")] = None
    price: Annotated[str | None, typer.Option(help="Price of one GPU-hour: adds the money that a run costs.")] = None
    mfu: Annotated[str | None, typer.Option(help="Model FLOPs utilisation to assume instead of predicting it.")] = None
    software: Annotated[str | None, typer.Option(help="Software whose speed is predicted. Default: megallama.")] = None
    hardware: Annotated[Path | None, typer.Option(help="YAML file of more GPUs, or of other figures of them.")] = None
    tokens: Annotated[str | None, typer.Option(help="Training tokens, as 2e12 or 2T.")] = None
    unique_tokens: Annotated[str | None, typer.Option(help="Tokens in the dataset: warns where they repeat.")] = None
    flops: Annotated[str | None, typer.Option(help="Training compute, as 1e21: finds the best model for it.")] = None
    params: Annotated[str | None, typer.Option(help="Parameters, as 7e9 or 7B: finds the best data for them.")] = None
    tokens_per_param: Annotated[
        str | None, typer.Option(help="Tokens per parameter. Default: the compute-optimal ones.")
    ] = None
    days: Annotated[str | None, typer.Option(help="With --gpus: a budget of so many days.")] = None
    vocab: Annotated[str | None, typer.Option(help="Vocabulary of the model that is found. Default: 32000.")] = None
    search: Annotated[bool, typer.Option("--search", help="Rank every legal layout by predicted step time.")] = False
    write: Annotated[Path | None, typer.Option(help="With --search: write the best layout as a config.")] = None
    sbatch: Annotated[Path | None, typer.Option(help="With --write: write a Slurm job file for it.")] = None
    timeline: Annotated[bool, typer.Option("--timeline", help="Draw what each pipeline rank does when.")] = False
    plot: Annotated[Path | None, typer.Option(help="Draw the memory of each rank: .png, .svg or .pdf.")] = None
    check: Annotated[bool, typer.Option("--check", help="Build a rank's stages on fake tensors and compare.")] = False
    rank: Annotated[str | None, typer.Option(help="With --check: the rank. Default: the last.")] = None
    calibrate: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Fit predictions to the steps of this run directory.")
    ] = None
    explain: Annotated[bool, typer.Option("--explain", help="Print every figure beside its arithmetic.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print a dictionary for scripts.")] = False

    @property
    def flags(self) -> Flags:
        """The words that size a run, or its cost."""
        return Flags(**{field.name: getattr(self, field.name) for field in fields(Flags)})

    def typed(self, *names: str) -> list[str]:
        """List those of these that were typed, as they were."""
        return [f"--{name.replace('_', '-')}={value}" for name in names if (value := getattr(self, name)) is not None]

    def world_size(self, config: RunConfig) -> int:
        """Ranks of the run: one copy of the model unless a number was typed."""
        one_copy = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
        return one_copy if self.gpus is None else count("--gpus", self.gpus, 10**7, f"{one_copy}")

    def device(self) -> Gpu | None:
        """The accelerator, None where none was named; UserError for one that is not known."""
        from megallama.plan.hardware import find_gpu, load_hardware

        if self.gpu is None and (typed := self.typed("software", "hardware", "price", "mfu")):
            raise UserError(f"{typed[0]} needs a kind of GPU; add --gpu h100, or leave it out")
        return None if self.gpu is None else find_gpu(self.gpu, load_hardware(self.hardware))

    def software_on(self, gpu: Gpu) -> Software:
        """The assumptions that were named; UserError for a name that is not known."""
        from megallama.plan.time.software import DEFAULT, find_software

        return find_software(gpu, DEFAULT if self.software is None else self.software)

    def machine(self, gpu: Gpu) -> Machine:
        """What the run is planned on; UserError where it has no constant, and no MFU takes its place."""
        from megallama.plan.time.software import machine

        return machine(gpu, self.software_on(gpu), self.assumed_mfu())

    def assumed_mfu(self) -> float | None:
        """The utilisation that takes the place of what is predicted."""
        return None if self.mfu is None else number("--mfu", self.mfu, 0.01, 1, "0.4")

    def money_per_hour(self) -> float | None:
        """The price of one GPU, None where none was typed."""
        return None if self.price is None else number("--price", self.price, 0, 1e9, "2.5")

    def length(self) -> float | None:
        """The tokens that take the place of a run's own length."""
        return amount("--tokens", self.tokens, "2e12 or 2T")


def taking(command: Callable[[Asked], None]) -> Callable[..., None]:
    """`command` as a function whose parameters are the fields of `Asked`, which is what typer reads."""
    hints = get_type_hints(Asked, include_extras=True)

    def called(**words: object) -> None:
        command(Asked(**words))  # type: ignore[arg-type]

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(each.name, kind, default=each.default, annotation=hints[each.name])
            for each in fields(Asked)
        ]
    )
    called.__annotations__, called.__doc__, called.__name__ = hints, command.__doc__, command.__name__
    return called


@taking
def plan(asked: Asked) -> None:
    """Plan a run: parameters, memory, step time and cost. Or size one: the best model and data for a budget.

    Examples: megallama plan configs/7b.yaml --gpus 128 --gpu h100; megallama plan --params 7B --tokens 1T --gpu a100
    """
    for name in ("write", "sbatch", "plot"):
        check_printable(f"--{name}", str(getattr(asked, name) or ""))
    modes = [name for name in ("timeline", "check", "search", "plot") if getattr(asked, name)]
    _refuse_clashes(asked, modes)
    if asked.calibrate is not None:
        _print(_calibrated(asked.calibrate, asked.hardware), asked.as_json)
    elif asked.config_path is None:
        _print(_sizing(asked), asked.as_json)
    else:
        config = _config(asked.config_path, asked)
        {"timeline": _timeline, "check": _check, "search": _search, "plot": _plot}.get(
            modes[0] if modes else "", _planned
        )(config, asked)


def _refuse_clashes(asked: Asked, modes: list[str]) -> None:
    """UserError for words that do not go together, or have no say in what is printed."""
    flags = asked.flags
    if asked.calibrate is not None:
        others = [str(asked.config_path)] if asked.config_path else []
        others += flags.all_typed + asked.typed("software") + [f"--{mode}" for mode in modes]
        if others:
            raise UserError(f"--calibrate={asked.calibrate} does not go with {others[0]}; leave one of them out")
    if modes:
        used = {"search": ("gpus", "gpu", "tokens", "price", "mfu"), "plot": ("gpus", "gpu")}.get(modes[0], ("gpus",))
        clashing = [f"--{mode}" for mode in modes[1:]]
        clashing += flags.typed(*(field.name for field in fields(flags) if field.name not in used))
        if modes[0] != "search":
            clashing += ["--explain"] if asked.explain else []
            clashing += asked.typed("software") + (["--json"] if asked.as_json else [])
            clashing += asked.typed("hardware") if modes[0] != "plot" else []
        if clashing:
            raise UserError(f"--{modes[0]} does not go with {clashing[0]}; leave one of them out")
        if asked.config_path is None:
            raise UserError(f"--{modes[0]} needs a CONFIG such as configs/7b.yaml")
    if asked.software is not None and asked.mfu is not None:
        raise UserError(f"--mfu={asked.mfu} leaves --software={asked.software} no say; leave one of them out")
    if asked.rank is not None and not asked.check:
        raise UserError(f"--rank={asked.rank} says which rank --check builds; give --check, or leave it out")
    if asked.write is not None and not asked.search:
        raise UserError(f"--write={asked.write} is for the best layout of --search; give --search, or leave it out")
    if asked.sbatch is not None and asked.write is None:
        raise UserError(f"--sbatch={asked.sbatch} runs the config that --write names; give --write run.yaml as well")


def _print(parts: list[Part], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(with_notes(parts), indent=2))
        return
    typer.echo(render(parts, shutil.get_terminal_size().columns))


def _sizing(asked: Asked) -> list[Part]:
    """The answer without a config."""
    if typed := asked.typed("software"):
        raise UserError(f"{typed[0]} needs a CONFIG such as configs/7b.yaml, or leave it out")
    if asked.hardware is not None and asked.gpu is None:
        raise UserError(f"--hardware={asked.hardware} needs --gpu with one of its names; add it, or leave it out")
    question = read_flags(asked.flags, asked.hardware)
    if question.asks:
        return plan_sizing(question)
    what = "give a CONFIG such as configs/7b.yaml, or --flops, --params, --tokens, or --gpus with --days"
    idle = asked.typed("unique_tokens", "vocab")
    raise UserError(f"nothing to plan{f' for {idle[0]}' if idle else ''}; {what}")


def _config(path: Path, asked: Asked) -> RunConfig:
    """The run; UserError for words that would size another one."""
    from megallama.config.load import load_config

    if sizing := asked.typed("params", "days", "vocab", "tokens_per_param"):
        raise UserError(f"{sizing[0]} contradicts {path}, which sizes the run itself; leave one of them out")
    return load_config(path, asked.overrides or ())


def _planned(config: RunConfig, asked: Asked) -> None:
    """Print the first screen, or every figure; UserError at last for what keeps the run from being planned wholly."""
    from megallama.plan.search.changes import refuse_too_large

    gpu = asked.device()
    if gpu is not None:  # what is mistyped is refused before anything is printed
        asked.software_on(gpu)
        asked.assumed_mfu()
    without_time = (_tables if asked.explain or asked.as_json else _first_screen)(config, asked)
    if gpu is not None and gpu.memory_gib is not None:
        refuse_too_large(config, asked.world_size(config), gpu)
    if without_time is not None:
        raise without_time


def _tables(config: RunConfig, asked: Asked) -> UserError | None:
    """Print every figure beside its arithmetic; returns why there is no step time where a GPU was named."""
    from megallama.layout.budget import planned_tokens
    from megallama.layout.counts import count_parameters
    from megallama.plan.report.run import plan_run

    tokens, world_size = planned_tokens(config, asked.length()), asked.world_size(config)
    parts, beside = plan_run(config, world_size, asked.length()), _beside(asked, tokens)
    of_device, without_time = _device_parts(config, world_size, tokens, asked)
    _print([*parts, *of_device, *compared(count_parameters(config.model).total, tokens), *beside], asked.as_json)
    return without_time


def _device_parts(
    config: RunConfig, world_size: int, tokens: float, asked: Asked
) -> tuple[list[Part], UserError | None]:
    """Whether it fits, step time, cost and single changes where GPUs are named; and why there is no step time."""
    from megallama.plan.report.run import fit_part
    from megallama.plan.report.summary import changes_part
    from megallama.plan.report.time import time_parts

    gpu = asked.device()
    if gpu is None:
        return [], None
    price = asked.money_per_hour()
    fit = [fit_part(config, world_size, gpu)] if gpu.memory_gib is not None else []
    try:
        on = asked.machine(gpu)
        parts = time_parts(config, world_size, on, tokens, price)
    except UserError as reason:
        none = Part("step_time", f"No step time on {gpu.name}", (), f"{reason}.")
        return [*fit, none], reason
    changes = [changes_part(config, world_size, on)] if fit and on.mfu is None else []
    return [*fit, *parts, *changes], None


def _beside(asked: Asked, tokens: float) -> list[Part]:
    """What else was asked of the run's data, or of another compute."""
    unique_tokens = amount("--unique-tokens", asked.unique_tokens, "5e11 or 500B")
    compute = amount("--flops", asked.flops, "1e21")
    found = [] if unique_tokens is None else [repetition(tokens, unique_tokens)]
    return found if compute is None else [*found, optimum("flops", compute)]


def _first_screen(config: RunConfig, asked: Asked) -> UserError | None:
    """Print what a run comes to in a screen, and what its data or another compute come to where that was asked."""
    from megallama.layout.budget import planned_tokens
    from megallama.layout.check import check_config
    from megallama.plan.report.summary import summarise

    world_size, gpu = asked.world_size(config), asked.device()
    check_config(config, world_size)
    beside, price = _beside(asked, planned_tokens(config, asked.length())), asked.money_per_hour()
    summary = summarise(config, world_size, gpu, asked.machine, asked.length(), price)
    typer.echo(summary.render())
    if beside:
        _print(beside, as_json=False)
    return summary.without_time


def _search(config: RunConfig, asked: Asked) -> None:
    """Print the fastest layouts, and write the winner where asked to."""
    from megallama.layout.budget import planned_tokens
    from megallama.plan.report.search import held_targets, search_dictionary, search_parts, write_winner
    from megallama.plan.report.time import check_type
    from megallama.plan.search.search import search

    gpu = asked.device()
    if gpu is None or asked.gpus is None:
        raise UserError("--search needs how many GPUs of which kind; add --gpus 64 --gpu h100")
    check_type(config, gpu)
    tokens, price = planned_tokens(config, asked.length()), asked.money_per_hour()
    with held_targets(asked.write, asked.sbatch):
        on = asked.machine(gpu)
        result = search(config, asked.world_size(config), on)
        if asked.as_json:
            typer.echo(json.dumps(search_dictionary(result, gpu, tokens, price), indent=2))
        else:
            _print(search_parts(result, on, tokens, price, explain=asked.explain), as_json=False)
        if asked.write is not None:
            for line in write_winner(result.found[0], gpu, asked.write, asked.sbatch):
                typer.echo(line, err=asked.as_json)


def _timeline(config: RunConfig, asked: Asked) -> None:
    from megallama.layout.check import check_config
    from megallama.plan.time.simulation import timeline

    if config.parallel.pipeline == 1:
        raise UserError("parallel.pipeline=1 has no timeline: every micro-batch follows the other; set it above 1")
    batching = check_config(config, asked.world_size(config))
    width = max(60, shutil.get_terminal_size().columns - 6)
    typer.echo(timeline(config, batching.gradient_accumulation_steps, width))


def _check(config: RunConfig, asked: Asked) -> None:
    """Print what the ledger says of a rank beside what its real stages do; exit code 1 if they differ."""
    from megallama.layout.check import check_config

    world_size = asked.world_size(config)
    check_config(config, world_size)
    last = world_size - 1
    chosen = last if asked.rank is None else count("--rank", asked.rank, last, f"{last}", low=0)
    # Imports torch, which nothing else here does.
    from megallama.plan.memory.dry_run import check_rank

    found = check_rank(config, world_size, chosen)
    width = max(len(each.name) for each in found)
    typer.echo(f"{'':{width}}  {'planned':>20}  {'counted':>20}")
    for each in found:
        verdict = "" if each.equal else "  differs"
        typer.echo(f"{each.name:{width}}  {each.planned:>20,}  {each.counted:>20,}{verdict}")
    if not all(each.equal for each in found):
        raise typer.Exit(1)


def _plot(config: RunConfig, asked: Asked) -> None:
    from megallama.plan.report.plot import plot_plan

    assert asked.plot is not None
    plot_plan(config, asked.world_size(config), asked.plot, asked.device())
    typer.echo(f"the memory of each pipeline rank is in {asked.plot}")


def _calibrated(run: Path, hardware: Path | None) -> list[Part]:
    from megallama.plan.calibration.calibrate import calibrate

    return calibrate(run, hardware)
