"""`megallama ...`: every command parses, delegates and prints; what needs torch imports it when it runs."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megallama.checkpoint.commands.cli import checkpoint_app
from megallama.cluster.cli import launch
from megallama.corpus.cli import data_app, tokenizer_app
from megallama.errors import UserError, refuse_hidden, refusing
from megallama.evaluation.cli import evaluate
from megallama.exchange.cli import export_command, import_command
from megallama.generation.cli import chat, generate, serve
from megallama.plan.cli import plan
from megallama.report.cli import report

if TYPE_CHECKING:
    from rich.console import Console

    from megallama.config.schema import RunConfig

_ENDED = {130: "Ctrl-C", 143: "SIGTERM"}

app = typer.Typer(
    help="Pretrain Llama models: plan a run, prepare data, verify layouts, inspect checkpoints, generate text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(launch)
app.command()(report)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command("eval")(evaluate)
app.command("export")(export_command)
app.command("import")(import_command)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(checkpoint_app, name="checkpoint")


@app.command()
def config(
    config_path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Config file of a run.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    gpus: Annotated[int | None, typer.Option(help="Number of ranks. Default: one copy of the model.", min=1)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a config, for editors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a config, and print it with all defaults and its DeepSpeed dictionary.

    Example: megallama config configs/7b.yaml train.micro_batch_size=2 --gpus 128
    """
    # The schema takes a quarter of a second to import, which no other command need wait for.
    from megallama.checkpoint.state import seen_before
    from megallama.config.json_schema import json_schema
    from megallama.config.load import dump_config, load_config
    from megallama.layout.check import check_config

    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
        return
    if config_path is None:
        raise UserError("no CONFIG given; name a file such as configs/quickstart.yaml, or ask for --schema")
    from megallama.config.deepspeed import deepspeed_config

    run = load_config(config_path, overrides or ())
    one_copy = run.parallel.model_ranks
    batching = check_config(run, one_copy if gpus is None else gpus, seen_before(run))
    engine = deepspeed_config(run, batching.dp_size * run.parallel.context)
    if as_json:
        typer.echo(json.dumps({"config": run.model_dump(mode="json"), "deepspeed": engine}, indent=2))
        return
    typer.echo(dump_config(run))
    shared = f", cp {run.parallel.context}" if run.parallel.context > 1 else ""
    typer.echo(f"# DeepSpeed, on {batching.world_size} ranks, dp {batching.dp_size}{shared}:")
    typer.echo(json.dumps(engine, indent=2))


@app.command()
def verify(
    context: typer.Context,
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    layouts: Annotated[
        str | None, typer.Option(help="Comma-separated, such as tp2,pp2-dualpipev. Default: one of each kind.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to train at each layout.", min=1)] = 5,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 with larger tolerances.")] = "fp32",
    types: Annotated[
        bool, typer.Option("--types", help="Train nothing: check the types of the run's collectives at its whole mesh.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(help="With --types: number of ranks. Default: one copy of the model.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a small version of a run at many layouts, with real processes on this machine, and compare them.

    Exit code 1 if any layout differs from a single process. Example: megallama verify configs/7b.yaml
    """
    from rich.console import Console

    from megallama.config.load import load_config
    from megallama.layout.names import default_layouts, parse_layout

    others = ("layouts", "steps", "dtype") if types else ("gpus",)
    for name in others:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(
                f"--{name} " + ("does not go with --types, which trains nothing" if types else "needs --types")
            )
    config = load_config(config_path, overrides or ())
    # A pipe has no width; the table has.
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 140)
    if types:
        raise typer.Exit(0 if _verify_types(config, gpus, console, as_json=as_json) else 1)
    from megallama.verify.report import as_json as report_json
    from megallama.verify.report import print_report
    from megallama.verify.shrink import LAYERS, shrink_model
    from megallama.verify.verify import verify as run_verify

    if layouts:
        wanted = [parse_layout(name) for name in layouts.split(",")]
    else:
        wanted = default_layouts(shrink_model(config.model, LAYERS))
    with console.status("one process") as status:
        report = run_verify(config, wanted, steps=steps, dtype=dtype, resume=steps > 1, progress=status.update)
    if as_json:
        typer.echo(report_json(report))
    else:
        print_report(report, console)
    raise typer.Exit(0 if report.passed else 1)


def _verify_types(config: RunConfig, gpus: int | None, console: Console, *, as_json: bool) -> bool:
    """Whether every type fits, after printing it."""
    try:
        from megallama.verify.types import check_types
    except ModuleNotFoundError as error:
        if error.name != "spmd_types":
            raise
        raise UserError("--types needs the package spmd_types; pip install 'megallama[types]'") from None
    from megallama.verify.types_report import print_types, types_as_json

    with console.status("types") as status:
        report = check_types(config, gpus or config.parallel.model_ranks, progress=status.update)
    if as_json:
        typer.echo(types_as_json(report))
    else:
        print_types(report, config, console)
    return report.fault is None


def _names(words: Sequence[str]) -> list[str]:
    """The words of a command but its prompt: that is text, which may have lines."""
    return [
        word for before, word in pairwise(["", *words]) if before != "--prompt" and not word.startswith("--prompt=")
    ]


def main() -> None:
    """Run a command; a user's mistake ends in one sentence and exit code 2, a Ctrl-C in one and 130, SIGTERM in 143."""
    try:
        with refusing():
            refuse_hidden(_names(sys.argv[1:]))
            app()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"megallama: {UserError(f'{error.filename} is too long for the name of a file')}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code in _ENDED:  # typer makes 130 of a Ctrl-C, without a word
            print(f"megallama: ended by {_ENDED[end.code]}; the same command starts again", file=sys.stderr)
        raise
