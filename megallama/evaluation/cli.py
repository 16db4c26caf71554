"""`megallama eval`: what needs torch is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megallama.generation.cli import AVERAGE, DEVICE, DTYPE, RUN

if TYPE_CHECKING:
    from megallama.evaluation.score import Score


def evaluate(
    path: Annotated[Path, RUN],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A text file, a folder, or the prefix of a dataset.")],
    window: Annotated[int | None, typer.Option(help="Tokens that the model reads at once.", min=1)] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows. Default: half a window.", min=1)] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Documents behind each other, as for training.")] = False,
    limit: Annotated[int | None, typer.Option(help="Read so many documents only.", min=1)] = None,
    text_field: Annotated[str, typer.Option(help="The field of a JSON line that holds the text.")] = "text",
    batch_size: Annotated[int, typer.Option(help="Windows that are computed together.", min=1, max=4096)] = 8,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    average: Annotated[bool, AVERAGE] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the loss, perplexity and bits per byte of a model on text.

    Example: megallama eval runs/quickstart data/held-out.jsonl --stride 64
    """
    from rich.console import Console

    from megallama.evaluation.score import score, settings_for
    from megallama.evaluation.texts import read_texts, some
    from megallama.generation.load import load_here

    with load_here(path, device, dtype, average=average) as (loaded, first):
        settings = settings_for(loaded, window, stride, packed, batch_size)
        texts = read_texts(data, loaded.tokenizer, text_field)
        chosen = some(texts, limit, data)
        with Console(stderr=True).status("reading") as status:

            def tell(so_far: Score) -> None:
                status.update(f"{so_far.tokens:,} tokens, loss {so_far.loss:.4f}")

            found = score(loaded, chosen, settings, tell).as_dict()
        if first and as_json:
            asked = {"model": str(loaded.source), "data": data, "window": settings.window, "stride": settings.stride}
            typer.echo(json.dumps({**asked, "packed": packed, **found}, indent=2))
        elif first:
            typer.echo(f"loss           {found['loss']:.4f} per token")
            typer.echo(f"perplexity     {found['perplexity']:.3f}")
            typer.echo(f"bits per byte  {found['bits_per_byte']:.4f}")
            counts = f"{found['documents']:,} documents, {found['tokens']:,} tokens, {found['bytes']:,} bytes"
            typer.echo(f"{counts}; windows of {settings.window:,} tokens, {settings.stride:,} apart")
