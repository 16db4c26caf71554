"""`megallama config`: a run as it resolves, and the DeepSpeed dictionary that it becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from megallama.errors import UserError


def config(
    config_path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML of a run.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    gpus: Annotated[int | None, typer.Option(help="Ranks; by default one copy of the model.", min=1)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a file, for editors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one dictionary for scripts.")] = False,
) -> None:
    """The resolved run and its DeepSpeed dictionary, after every check.

    Example: megallama config configs/7b.yaml train.micro_batch_size=2 --gpus 128
    """
    # The schema takes a quarter of a second to import, which no other command need wait for.
    from megallama.checkpoint.state import seen_before
    from megallama.config.check import check_config
    from megallama.config.json_schema import json_schema
    from megallama.config.load import dump_config, load_config

    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
        return
    if config_path is None:
        raise UserError("no CONFIG given; name a file such as configs/quickstart.yaml, or ask for --schema")
    from megallama.config.deepspeed import deepspeed_config

    run = load_config(config_path, overrides or ())
    one_copy = run.parallel.tensor * run.parallel.pipeline * run.parallel.context
    batching = check_config(run, one_copy if gpus is None else gpus, seen_before(run))
    engine = deepspeed_config(run, batching.dp_size)
    if as_json:
        typer.echo(json.dumps({"config": run.model_dump(mode="json"), "deepspeed": engine}, indent=2))
        return
    typer.echo(dump_config(run))
    typer.echo(f"# DeepSpeed, on {batching.world_size} ranks, dp {batching.dp_size}:")
    typer.echo(json.dumps(engine, indent=2))
