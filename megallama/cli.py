"""`megallama ...`: every command parses, delegates and prints; what needs torch imports it when it runs."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from megallama.checkpoint.commands.cli import checkpoint_app
from megallama.cluster.cli import launch
from megallama.corpus.cli import data_app, tokenizer_app
from megallama.errors import UserError, refuse_hidden
from megallama.evaluation.cli import evaluate
from megallama.exchange.cli import export_command, import_command
from megallama.generation.cli import chat, generate, serve
from megallama.plan.cli import plan

_ENDED = {130: "Ctrl-C", 143: "SIGTERM"}

app = typer.Typer(
    help="Pretrain Llama models: plan a run, prepare data, verify layouts, inspect checkpoints, generate text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(launch)
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
    engine = deepspeed_config(run, batching.dp_size)
    if as_json:
        typer.echo(json.dumps({"config": run.model_dump(mode="json"), "deepspeed": engine}, indent=2))
        return
    typer.echo(dump_config(run))
    typer.echo(f"# DeepSpeed, on {batching.world_size} ranks, dp {batching.dp_size}:")
    typer.echo(json.dumps(engine, indent=2))


@app.command()
def verify(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    layouts: Annotated[
        str | None, typer.Option(help="Comma-separated, such as tp2,pp2-dualpipev. Default: one of each kind.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to train at each layout.", min=1)] = 5,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 with larger tolerances.")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a small version of a run at many layouts, with real processes on this machine, and compare them.

    Exit code 1 if any layout differs from a single process. Example: megallama verify configs/7b.yaml
    """
    from rich.console import Console

    from megallama.config.load import load_config
    from megallama.layout.names import default_layouts, parse_layout
    from megallama.verify.report import as_json as report_json
    from megallama.verify.report import print_report
    from megallama.verify.verify import verify as run_verify

    # A pipe has no width; the table has.
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 140)
    config = load_config(config_path, overrides or ())
    wanted = [parse_layout(name) for name in layouts.split(",")] if layouts else default_layouts(config.model)
    with console.status("one process") as status:
        report = run_verify(config, wanted, steps=steps, dtype=dtype, resume=steps > 1, progress=status.update)
    if as_json:
        typer.echo(report_json(report))
    else:
        print_report(report, console)
    raise typer.Exit(0 if report.passed else 1)


def _names(words: Sequence[str]) -> list[str]:
    """The words of a command but its prompt: that is text, which may have lines."""
    return [
        word for before, word in pairwise(["", *words]) if before != "--prompt" and not word.startswith("--prompt=")
    ]


def main() -> None:
    """Run a command; a user's mistake ends in one sentence and exit code 2, a Ctrl-C in one and 130, SIGTERM in 143."""
    try:
        refuse_hidden(_names(sys.argv[1:]))
        app()
    except UserError as error:
        print(f"megallama: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"megallama: {UserError(f'{error.filename} is too long for the name of a file')}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code in _ENDED:  # typer makes 130 of a Ctrl-C, without a word
            print(f"megallama: ended by {_ENDED[end.code]}; the same command starts again", file=sys.stderr)
        raise
