"""`megallama data ...` and `megallama tokenizer ...`."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from megallama.errors import printable

Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE...", help="`stdlib`, a .txt, .jsonl, .jsonl.gz or .jsonl.zst file, or a folder."),
]
TextField = Annotated[str, typer.Option(help="JSON field that holds the text.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

TOKENIZERS = "`bytes`, a tiktoken encoding, a rank file, a folder or hf:FILE, a tokenizer.json."

data_app = typer.Typer(help="Build and inspect datasets.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train and inspect tokenizers.", no_args_is_help=True)


@data_app.command("build")
def build_command(
    sources: Sources,
    output: Annotated[str, typer.Option(metavar="PREFIX", help="Write PREFIX.bin, PREFIX.idx and PREFIX.json.")],
    tokenizer: Annotated[str, typer.Option(help=TOKENIZERS)] = "bytes",
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes. Default: one per CPU.")] = None,
    text_field: TextField = "text",
    force: Force = False,
) -> None:
    """Build a dataset from text. An output that was built from the same inputs is kept.

    Example: megallama data build stdlib --output data/stdlib --tokenizer data/tokenizer
    """
    from megallama.corpus.build import build_dataset

    begin = time.monotonic()
    info, reused = build_dataset(sources, output, tokenizer, workers=workers, text_field=text_field, force=force)
    done = "kept, its inputs are the same" if reused else f"built in {time.monotonic() - begin:.1f} s"
    typer.echo(f"{output}: {info.documents:,} documents, {info.tokens:,} tokens, {done}")


@data_app.command("info")
def data_info_command(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Dataset prefix, as in `data build --output`.")],
    tokenizer: Annotated[
        str | None, typer.Option(help=f"Of a dataset that does not name its own: {TOKENIZERS}")
    ] = None,
    documents: Annotated[int, typer.Option(min=0, help="How many documents to show, the first and the last.")] = 4,
    document: Annotated[
        int | None, typer.Option(metavar="K", min=0, help="Show document K alone, whole; the first is 0.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a dataset, including one written by Megatron-LM: counts, lengths, text.

    Example: megallama data info data/stdlib --documents 6
    """
    from megallama.corpus.describe import describe, description, document_lines, show

    if document is None:
        facts = describe(prefix, tokenizer, documents)
        lines = description(facts)
    else:
        facts = show(prefix, tokenizer, document)
        lines = document_lines(facts)
    for line in [json.dumps(facts)] if as_json else lines:
        typer.echo(line)


@tokenizer_app.command("train")
def train_command(
    sources: Sources,
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Folder for the tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Vocabulary size, including the end-of-document token.")] = 4096,
    text_field: TextField = "text",
    force: Force = False,
) -> None:
    """Train a byte-level BPE tokenizer. An output that was trained from the same inputs is kept.

    Example: megallama tokenizer train stdlib --output data/tokenizer --vocab-size 4096
    """
    from megallama.corpus.train_tokenizer import train_tokenizer

    begin = time.monotonic()
    tokenizer, reused = train_tokenizer(sources, output, vocab_size, text_field=text_field, force=force)
    done = "kept, its inputs are the same" if reused else f"trained in {time.monotonic() - begin:.1f} s"
    typer.echo(f"{output}: {tokenizer.vocab_size:,} entries, {done}")


@tokenizer_app.command("info")
def tokenizer_info_command(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help=TOKENIZERS)],
    as_json: AsJson = False,
) -> None:
    """Describe a tokenizer.

    Example: megallama tokenizer info data/tokenizer
    """
    from megallama.text.tokenizer import load_tokenizer

    found = load_tokenizer(spec)
    facts = {
        "tokenizer": spec,
        "vocab_size": found.vocab_size,
        "eod_id": found.eod_id,
        "fingerprint": found.fingerprint,
    }
    _print_facts(facts, as_json)


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        typer.echo(f"{name:12} {'unknown' if value is None else printable(str(value))}")
