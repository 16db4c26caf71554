"""`megallama export` and `megallama import`: models to and from other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_command(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    form: Annotated[str, typer.Option("--format", help="hf for transformers, or meta.")] = "hf",
    dtype: Annotated[str, typer.Option(help="Type of the numbers: bf16 or fp32.")] = "bf16",
    average: Annotated[
        bool, typer.Option("--average", help="The average of the weights that train.average saves.")
    ] = False,
) -> None:
    """Write the newest healthy checkpoint of a run as a model folder of another program.

    Example: megallama export runs/quickstart models/quickstart
    """
    from megallama.exchange.outgoing import export

    path = export(source, out, form, dtype, average=average)
    typer.echo(f"exported {'the average in ' if average else ''}{path} to {out}")


def import_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a Hugging Face, Meta or Megatron Llama.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Run directory to make.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Size to grow the vocabulary to.", min=1)] = None,
    program: Annotated[
        str | None,
        typer.Option("--from", help="What wrote FOLDER: hf, meta or megatron. Default: hf or meta, as its files tell."),
    ] = None,
) -> None:
    """Make a run directory with the weights of a published Llama: config, tokenizer and a checkpoint of step 0.

    Example: megallama import Llama-3.1-8B runs/llama data.path=data/corpus
    """
    from megallama.exchange.incoming import import_folder

    made = import_folder(folder, out, overrides or [], vocab_size, program)
    typer.echo(f"imported {made.parameters:,} parameters, stored in {' and '.join(made.types)}, from {folder} to {out}")
    told = any(override.startswith(("data.path=", "data.mixture=")) for override in overrides or ())
    typer.echo(f"train them with launch/pretrain.py --config {made.config}{'' if told else ' data.path=PREFIX'}")
