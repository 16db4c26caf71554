"""`megallama plan`: what a run costs, before any of it is spent. Imports no torch, so it answers at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megallama.errors import UserError, check_printable
from megallama.plan.report.sizing import compared, optimum, plan_sizing, repetition
from megallama.plan.report.table import Part, render, with_notes
from megallama.plan.sizing.flags import Flags, amount, count, number, read_flags
from megallama.plan.sizing.sizing import size

if TYPE_CHECKING:
    from megallama.config.schema import RunConfig
    from megallama.plan.hardware import Gpu
    from megallama.plan.time.software import Software

# The schema takes a quarter of a second to import, which sizing need not wait for: hence the imports in functions.


def plan(
    config_path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML of a run.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    gpus: Annotated[str | None, typer.Option(help="Ranks; by default one copy of the model.")] = None,
    flops: Annotated[str | None, typer.Option(help="Compute, as 1e21: its optimal parameters and tokens.")] = None,
    params: Annotated[str | None, typer.Option(help="Parameters, as 7e9 or 7B: their optimal tokens.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens, as 2e12 or 2T: their optimal parameters; or a CONFIG's length.")
    ] = None,
    days: Annotated[str | None, typer.Option(help="With --gpus and no CONFIG: the compute of that many days.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Kind of these GPUs, as h100: for a CONFIG, step time and cost; or with --days.")
    ] = None,
    software: Annotated[str | None, typer.Option(help="Generation of software whose efficiency is taken.")] = None,
    hardware: Annotated[Path | None, typer.Option(help="YAML of more GPUs, or of other figures of these.")] = None,
    price: Annotated[str | None, typer.Option(help="Of one GPU and hour, for the money that a run costs.")] = None,
    mfu: Annotated[
        str | None, typer.Option(help="Share of their peak that training reaches, 0.4 unless given.")
    ] = None,
    unique_tokens: Annotated[
        str | None, typer.Option(help="Tokens that there are, as 500B: a warning where they repeat too often.")
    ] = None,
    vocab: Annotated[str | None, typer.Option(help="Vocabulary of the shape found, 32000 unless given.")] = None,
    timeline: Annotated[bool, typer.Option("--timeline", help="Draw what each pipeline rank does when.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Run a rank's stages on fake tensors and compare.")] = False,
    rank: Annotated[str | None, typer.Option(help="With --check: which rank; by default the last.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Rank every layout by predicted time.")] = False,
    write: Annotated[Path | None, typer.Option(help="With --search: write the fastest as a config.")] = None,
    sbatch: Annotated[Path | None, typer.Option(help="With --write: a job file of it for Slurm.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory and timeline into this file: .png, .svg or .pdf.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Fit the efficiency to this run directory, for later plans.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every figure beside its arithmetic.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a dictionary for scripts.")] = False,
) -> None:
    """Parameters, FLOPs and memory of a run; or the best size, data and shape for a budget. With the arithmetic.

    Examples: megallama plan configs/7b.yaml --gpus 128; megallama plan --flops 1e21; megallama plan --gpus 64 --days 30
    """
    flags = Flags(flops, params, tokens, gpus, days, gpu, mfu, unique_tokens, vocab)
    device = Device(gpu, software, hardware, price, mfu)
    for option, path in (("--write", write), ("--sbatch", sbatch), ("--plot", plot)):
        check_printable(option, str(path or ""))
    chosen = (("--timeline", timeline), ("--check", check), ("--search", search), ("--plot", plot))
    modes = [name for name, wanted in chosen if wanted]
    if modes and (clashing := modes[1:] + _unused(modes[0], flags, device, as_json)):
        raise UserError(f"{modes[0]} does not go with {clashing[0]}; leave one of them out")
    if modes and config_path is None:
        raise UserError(f"{modes[0]} needs a CONFIG such as configs/7b.yaml")
    _refuse_alone(rank, check, write, sbatch, search)
    if calibrate is not None:
        _refuse_beside(calibrate, config_path, flags, device)
        _print(_calibrated(calibrate, hardware), as_json)
        return
    if config_path is None:
        _refuse_without_config(flags, device)
        _print(_sizing(flags, hardware), as_json)
        return
    config, world_size = _run(config_path, overrides or (), flags)
    if timeline:
        typer.echo(_timeline(config, world_size))
    elif check:
        _check(config, world_size, rank)
    elif plot is not None:
        _plot(config, world_size, plot)
    elif search:
        _search(config, flags, device, write, sbatch, as_json)
    else:
        without_time = (_tables if explain or as_json else _first_screen)(config, world_size, flags, device, as_json)
        device.refuse_too_large(config, world_size)
        if without_time is not None:
            raise without_time


@dataclass(frozen=True)
class Device:
    """What was typed of the GPUs that a run is planned for."""

    name: str | None
    software: str | None
    hardware: Path | None
    price: str | None
    mfu: str | None

    def typed(self, *names: str) -> list[str]:
        """List those of these that were typed, as they were."""
        return [f"--{name}={value}" for name in names if (value := getattr(self, name)) is not None]

    def gpu(self) -> Gpu | None:
        """The accelerator, None where none was named; UserError for one that is not known."""
        from megallama.plan.hardware import find_gpu, load_hardware

        if self.name is None and (typed := self.typed("software", "hardware", "price", "mfu")):
            raise UserError(f"{typed[0]} needs a kind of GPU; add --gpu h100, or leave it out")
        return None if self.name is None else find_gpu(self.name, load_hardware(self.hardware))

    def money_per_hour(self) -> float | None:
        """The price of one GPU, None where none was typed."""
        return None if self.price is None else number("--price", self.price, 0, 1e9, "2.5")

    def software_on(self, gpu: Gpu) -> Software:
        """The assumptions that were named; UserError for a name that is not known."""
        from megallama.plan.time.software import DEFAULT, find_software

        return find_software(gpu, self.software or DEFAULT)

    def assumed_mfu(self) -> float | None:
        """The speed that was typed in place of a predicted one."""
        return None if self.mfu is None else number("--mfu", self.mfu, 0.01, 1, "0.4")

    def parts(self, config: RunConfig, world_size: int, tokens: float) -> tuple[list[Part], UserError | None]:
        """Whether it fits, step time, cost and single changes where GPUs are named; and why there is no step time."""
        from megallama.plan.report.memory import fit_part
        from megallama.plan.report.summary import changes_part
        from megallama.plan.report.time import time_parts
        from megallama.plan.time.software import machine

        gpu = self.gpu()
        if gpu is None:
            return [], None
        price, software = self.money_per_hour(), self.software_on(gpu)
        fit = [fit_part(config, world_size, gpu)] if gpu.memory_gib is not None else []
        try:
            on = machine(gpu, software, self.assumed_mfu())
            parts = time_parts(config, world_size, on, tokens, price)
        except UserError as reason:
            none = Part("step_time", f"No step time on {gpu.name}", (), f"{reason}.")
            return [*fit, none], reason
        changes = [changes_part(config, world_size, on)] if fit and on.mfu is None else []
        return [*fit, *parts, *changes], None

    def refuse_too_large(self, config: RunConfig, world_size: int) -> None:
        """UserError where the run does not fit these GPUs, by how much, and what would."""
        from megallama.plan.memory.fit import refuse_too_large

        if (gpu := self.gpu()) is not None and gpu.memory_gib is not None:
            refuse_too_large(config, world_size, gpu)


def _print(parts: list[Part], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(with_notes(parts), indent=2))
        return
    typer.echo(render(parts, shutil.get_terminal_size().columns))


def _unused(mode: str, flags: Flags, device: Device, as_json: bool) -> list[str]:
    """What was typed and has no say in what this mode prints."""
    searches = mode == "--search"
    used = ("gpus", "gpu") if searches else ("gpus",)
    found = flags.typed(*(field.name for field in fields(flags) if field.name not in used))
    found += device.typed(*(("price",) if searches else ("software", "hardware", "price")))
    return found + (["--json"] if as_json and not searches else [])


def _refuse_alone(rank: str | None, check: bool, write: Path | None, sbatch: Path | None, search: bool) -> None:
    """UserError for an option without the one that it belongs to."""
    if rank is not None and not check:
        raise UserError(f"--rank={rank} says which rank --check builds; give --check, or leave it out")
    if write is not None and not search:
        raise UserError(f"--write={write} is for the fastest layout of --search; give --search, or leave it out")
    if sbatch is not None and write is None:
        raise UserError(f"--sbatch={sbatch} runs the config that --write names; give --write run.yaml as well")


def _refuse_without_config(flags: Flags, device: Device) -> None:
    if typed := device.typed("software", "price"):
        raise UserError(f"{typed[0]} needs a CONFIG such as configs/7b.yaml, or leave it out")
    if device.hardware is not None and (flags.days is None or flags.gpu is None):
        raise UserError(
            f"--hardware={device.hardware} needs a CONFIG such as configs/7b.yaml, or --gpus 64 --days 30 and --gpu "
            "with one of its names; or leave it out"
        )


def _sizing(flags: Flags, hardware: Path | None) -> list[Part]:
    question = read_flags(flags, hardware)
    if question.asks:
        return plan_sizing(question)
    what = "give a CONFIG such as configs/7b.yaml, or --flops, --params, --tokens, or --gpus with --days"
    idle = flags.typed("unique_tokens", "vocab")
    raise UserError(f"nothing to plan{f' for {idle[0]}' if idle else ''}; {what}")


def _run(path: Path, overrides: Sequence[str], flags: Flags) -> tuple[RunConfig, int]:
    """The run and its ranks; UserError for flags that would size another one."""
    from megallama.config.load import load_config

    if sizing := flags.typed("params", "days", "vocab"):
        raise UserError(f"{sizing[0]} contradicts {path}, which sizes the run itself; leave one of them out")
    config = load_config(path, overrides)
    one_copy = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    return config, one_copy if flags.gpus is None else count("--gpus", flags.gpus, 10**7, f"{one_copy}")


def _planned(config: RunConfig, world_size: int, flags: Flags, device: Device) -> tuple[list[Part], UserError | None]:
    """The plan, and why it has no step time where a kind of GPU was named and there is none."""
    from megallama.layout.budget import planned_tokens
    from megallama.layout.counts import count_parameters
    from megallama.plan.report.report import plan_run

    given = amount("--tokens", flags.tokens, "2e12 or 2T")
    compute = amount("--flops", flags.flops, "1e21")
    unique_tokens = amount("--unique-tokens", flags.unique_tokens, "5e11 or 500B")
    parts = plan_run(config, world_size, given)
    tokens = planned_tokens(config, given)
    of_device, without_time = device.parts(config, world_size, tokens)
    parts += of_device
    parts += compared(count_parameters(config.model).total, tokens)
    if unique_tokens is not None:
        parts.append(repetition(tokens, unique_tokens))
    if compute is not None:
        parts += optimum(size("flops", compute))
    return parts, without_time


def _tables(config: RunConfig, world_size: int, flags: Flags, device: Device, as_json: bool) -> UserError | None:
    """Print every figure beside its arithmetic; returns why there is no step time where a GPU was named."""
    parts, without_time = _planned(config, world_size, flags, device)
    _print(parts, as_json)
    return without_time


def _first_screen(config: RunConfig, world_size: int, flags: Flags, device: Device, _: bool) -> UserError | None:
    """Print what a run comes to in a screen, and what its data or another compute come to where that was asked."""
    from megallama.layout.budget import planned_tokens
    from megallama.layout.check import check_config
    from megallama.plan.report.summary import summarise

    tokens = amount("--tokens", flags.tokens, "2e12 or 2T")
    unique_tokens = amount("--unique-tokens", flags.unique_tokens, "5e11 or 500B")
    compute = amount("--flops", flags.flops, "1e21")
    check_config(config, world_size)
    gpu = device.gpu()
    software = None if gpu is None else device.software_on(gpu)
    price = device.money_per_hour()
    summary = summarise(config, world_size, gpu, tokens, price, software, device.assumed_mfu())
    typer.echo(summary.render())
    beside = [] if unique_tokens is None else [repetition(planned_tokens(config, tokens), unique_tokens)]
    if beside or compute is not None:
        _print([*beside, *(optimum(size("flops", compute)) if compute is not None else [])], as_json=False)
    return summary.without_time


def _search(
    config: RunConfig, flags: Flags, device: Device, write: Path | None, sbatch: Path | None, as_json: bool
) -> None:
    """Print the fastest layouts, and write the winner where asked to."""
    from megallama.plan.report.search import held_targets, search_dictionary, search_parts, write_winner
    from megallama.plan.report.time import check_type
    from megallama.plan.search.search import search
    from megallama.plan.time.software import machine

    gpu = device.gpu()
    if gpu is None or flags.gpus is None:
        raise UserError("--search needs how many GPUs of which kind; add --gpus 64 --gpu h100")
    world_size = count("--gpus", flags.gpus, 10**7, "64")
    check_type(config, gpu)
    with held_targets(write, sbatch):
        result = search(config, world_size, machine(gpu, device.software_on(gpu)))
        if as_json:
            typer.echo(json.dumps(search_dictionary(result, gpu), indent=2))
        else:
            _print(search_parts(result, gpu), as_json=False)
        if write is not None:
            for line in write_winner(result.found[0], gpu, write, sbatch):
                typer.echo(line, err=as_json)


def _timeline(config: RunConfig, world_size: int) -> str:
    from megallama.layout.check import check_config
    from megallama.plan.time.timeline import timeline

    if config.parallel.pipeline == 1:
        raise UserError("parallel.pipeline=1 has no timeline: every micro-batch follows the other; set it above 1")
    batching = check_config(config, world_size)
    width = max(60, shutil.get_terminal_size().columns - 6)
    return timeline(config, batching.gradient_accumulation_steps, width)


def _check(config: RunConfig, world_size: int, rank: str | None) -> None:
    """Print what the ledger says of a rank beside what its real stages do; exit code 1 if they differ."""
    from megallama.layout.check import check_config

    check_config(config, world_size)
    last = world_size - 1
    chosen = last if rank is None else count("--rank", rank, last, f"{last}", low=0)
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


def _plot(config: RunConfig, world_size: int, path: Path) -> None:
    from megallama.plan.report.plot import plot_plan

    plot_plan(config, world_size, path)
    typer.echo(f"memory and timeline are in {path}")


def _calibrated(run: Path, hardware: Path | None) -> list[Part]:
    from megallama.plan.calibration.calibrate import calibrate

    return calibrate(run, hardware)


def _refuse_beside(run: Path, config: Path | None, flags: Flags, device: Device) -> None:
    """UserError for what would plan another run than the one that calibrates."""
    others = [str(config)] if config else []
    others += flags.typed(*(field.name for field in fields(flags))) + device.typed("software", "price")
    if others:
        raise UserError(f"--calibrate={run} does not go with {others[0]}; leave one of them out")
