"""The answer to each thing that `megallama plan` can be asked."""

from __future__ import annotations

import json
import shutil

import typer

from megallama.config.load import load_config
from megallama.config.numbers import count
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu, find_gpu, load_hardware
from megallama.layout.budget import planned_tokens
from megallama.layout.check import check_config
from megallama.layout.counts import count_parameters
from megallama.plan.asked import Asked
from megallama.plan.calibrate import calibrate
from megallama.plan.report.plot import plot_plan
from megallama.plan.report.run import fit_part, plan_run
from megallama.plan.report.search import held_targets, search_dictionary, search_parts, write_winner
from megallama.plan.report.sizing import compared, plan_sizing
from megallama.plan.report.summary import Timed, changes_part, summarise
from megallama.plan.report.table import Part, render, with_notes
from megallama.plan.report.time import check_type, time_parts
from megallama.plan.search.changes import refuse_too_large
from megallama.plan.search.search import search
from megallama.plan.sizing.question import read_question
from megallama.plan.time.simulation import timeline
from megallama.plan.time.software import DEFAULT, find_software, machine
from megallama.plan.time.step_time import step_time


def answer(asked: Asked) -> None:
    """Print what is asked; UserError for words that do not go together or are not legal."""
    asked.check_words()
    if asked.mode == "size":
        _print(plan_sizing(read_question(asked)), asked)
    elif asked.calibrate is not None:
        _print(calibrate(asked.calibrate, asked.hardware), asked)
    else:
        assert asked.config_path is not None
        config = load_config(asked.config_path, asked.overrides or ())
        {"timeline": _timeline, "check": _check, "search": _search, "plot": _plot, "run": _planned}[asked.mode](
            config, asked
        )


def _print(parts: list[Part], asked: Asked) -> None:
    wide = shutil.get_terminal_size().columns
    typer.echo(json.dumps(with_notes(parts), indent=2) if asked.as_json else render(parts, wide))


def _world_size(config: RunConfig, asked: Asked) -> int:
    """Ranks of the run: one copy of the model unless a number was typed."""
    one_copy = config.parallel.model_ranks
    return one_copy if asked.gpus is None else count("--gpus", asked.gpus, 10**7, f"{one_copy}")


def _gpu(asked: Asked) -> Gpu | None:
    """The accelerator, None where none was named; UserError for one that is not known."""
    return None if asked.gpu is None else find_gpu(asked.gpu, load_hardware(asked.hardware))


def _planned(config: RunConfig, asked: Asked) -> None:
    """Print the first screen, or every figure; UserError at last for what keeps the run from being planned wholly."""
    world_size, gpu, price = _world_size(config, asked), _gpu(asked), asked.money_per_hour()
    check_config(config, world_size)
    timed = None if gpu is None else timed_on(config, world_size, gpu, asked)
    if asked.explain or asked.as_json:
        tokens, size = planned_tokens(config, asked.length()), count_parameters(config.model).total
        parts = plan_run(config, world_size, asked.length())
        parts += [] if gpu is None or timed is None else _device_parts(config, world_size, gpu, timed, tokens, price)
        _print([*parts, *compared(size, tokens)], asked)
    else:
        typer.echo(summarise(config, world_size, gpu, timed, asked.length(), price).render())
    if gpu is not None and gpu.memory_gib is not None:
        refuse_too_large(config, world_size, gpu)
    if isinstance(timed, UserError):
        raise timed


def timed_on(config: RunConfig, world_size: int, gpu: Gpu, asked: Asked) -> Timed | UserError:
    """What the run is planned on and the time of a step, or why it has none; UserError for what is mistyped."""
    software, mfu = find_software(gpu, asked.software or DEFAULT), asked.assumed_mfu()
    try:
        check_type(config, gpu)
        on = machine(gpu, software, mfu)
        return on, step_time(config, world_size, on)
    except UserError as reason:
        return reason


def _device_parts(
    config: RunConfig, world_size: int, gpu: Gpu, timed: Timed | UserError, tokens: float, price: float | None
) -> list[Part]:
    """Whether it fits, step time, cost and single changes."""
    parts = [fit_part(config, world_size, gpu)] if gpu.memory_gib is not None else []
    if isinstance(timed, UserError):
        return [*parts, Part("step_time", f"No step time on {gpu.name}", (), f"{timed}.")]
    on, step = timed
    changes = [changes_part(config, world_size, on)] if parts and on.mfu is None else []
    return [*parts, *time_parts(config, world_size, on, step, tokens, price), *changes]


def _search(config: RunConfig, asked: Asked) -> None:
    """Print the fastest layouts, and write the winner where asked to."""
    gpu = _gpu(asked)
    if gpu is None or asked.gpus is None:
        raise UserError("--search needs how many GPUs of which kind; add --gpus 64 --gpu h100")
    check_type(config, gpu)
    tokens, price = planned_tokens(config, asked.length()), asked.money_per_hour()
    on = machine(gpu, find_software(gpu, asked.software or DEFAULT), asked.assumed_mfu())
    with held_targets(asked.write, asked.sbatch):
        result = search(config, _world_size(config, asked), on)
        if asked.as_json:
            typer.echo(json.dumps(search_dictionary(result, on, tokens, price), indent=2))
        else:
            _print(search_parts(result, on, tokens, price, explain=asked.explain), asked)
        if asked.write is not None:
            for line in write_winner(result.found[0], gpu, asked.write, asked.sbatch):
                typer.echo(line, err=asked.as_json)


def _timeline(config: RunConfig, asked: Asked) -> None:
    if config.parallel.pipeline == 1:
        raise UserError("parallel.pipeline=1 has no timeline: every micro-batch follows the other; set it above 1")
    batching = check_config(config, _world_size(config, asked))
    width = max(60, shutil.get_terminal_size().columns - 6)
    typer.echo(timeline(config, batching.gradient_accumulation_steps, width))


def _check(config: RunConfig, asked: Asked) -> None:
    """Print what the ledger says of a rank beside what its real stages do; exit code 1 if they differ."""
    world_size = _world_size(config, asked)
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
    assert asked.plot is not None
    plot_plan(config, _world_size(config, asked), asked.plot, _gpu(asked))
    typer.echo(f"the memory of each pipeline rank is in {asked.plot}")
