"""`megallama plan`: what a run costs, before any of it is spent. Imports no torch, so it answers at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from megallama.config.check import check_config
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.plan.report import as_dictionary, plan_budget, plan_run, render

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
# Far beyond any run, and near enough that no power of it leaves the range of a float.
_LARGEST = 1e30


def plan(
    config_path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML of a run.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    gpus: Annotated[int | None, typer.Option(help="Ranks; by default one copy of the model.", min=1)] = None,
    flops: Annotated[str | None, typer.Option(help="Compute: its optimal parameters and tokens.")] = None,
    params: Annotated[str | None, typer.Option(help="Parameters, as 7e9 or 7B: their optimal tokens.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens, as 2e12 or 2T, in place of train.steps.")] = None,
    timeline: Annotated[
        bool, typer.Option("--timeline", help="Draw what each pipeline rank does when; takes seconds, for torch.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a dictionary for scripts.")] = False,
) -> None:
    """Parameters, FLOPs, state memory and compute-optimal length of a run, with the arithmetic.

    Examples: megallama plan configs/7b.yaml --gpus 128; megallama plan --flops 1e21; megallama plan --params 7B
    """
    compute, size, data = _quantity("--flops", flops), _quantity("--params", params), _quantity("--tokens", tokens)
    options = (("--flops", flops), ("--params", params), ("--tokens", tokens))
    others = [f"{option}={text}" for option, text in options if text] + (["--json"] if as_json else [])
    if timeline and others:
        raise UserError(f"--timeline does not go with {others[0]}; leave one of them out")
    parts = []
    if config_path is not None:
        if size is not None:
            raise UserError(f"--params={params} contradicts {config_path}, which has its own; leave one of them out")
        config = load_config(config_path, overrides or ())
        one_copy = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
        if timeline:
            typer.echo(_timeline(config, one_copy if gpus is None else gpus))
            return
        parts += plan_run(config, one_copy if gpus is None else gpus, data)
        parts += plan_budget(compute, None, None)
    else:
        parts += plan_budget(compute, size, data)
    if timeline:
        raise UserError("--timeline needs a CONFIG such as configs/7b.yaml")
    if not parts:
        raise UserError("nothing to plan; give a CONFIG such as configs/7b.yaml, or --flops, --params or --tokens")
    if as_json:
        typer.echo(json.dumps(as_dictionary(parts), indent=2))
        return
    from rich.console import Console

    render(parts, Console())


def _timeline(config: RunConfig, world_size: int) -> str:
    from megallama.timeline import timeline

    if config.parallel.pipeline == 1:
        raise UserError("parallel.pipeline=1 has no timeline: every micro-batch follows the other; set it above 1")
    batching = check_config(config, world_size)
    width = max(60, shutil.get_terminal_size().columns - 6)
    return timeline(config, batching.gradient_accumulation_steps, width)


def _quantity(option: str, text: str | None) -> float | None:
    """`7e9`, `7000000000` or `7B` as a number from 1 to 1e30; UserError for anything else."""
    if text is None:
        return None
    unit = _SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        number = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        number = 0.0
    if not 1 <= number <= _LARGEST:
        raise UserError(f"{option}={text} is not a number from 1 to {_LARGEST:g}; write it as 7e9 or 7B")
    return number
