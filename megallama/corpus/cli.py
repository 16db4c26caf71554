"""`megallama data ...` and `megallama tokenizer ...`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from megallama.errors import UserError, printable

Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE...", help="`stdlib`, a .txt, .jsonl, .jsonl.gz or .jsonl.zst file, or a folder."),
]
TextField = Annotated[str, typer.Option(help="JSON field that holds the text.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file of a run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")]
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


@data_app.command("plan")
def data_plan_command(config_path: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run reads of each source: tokens, epochs, the step at which it repeats.

    Exit code 2 if a source would exceed its limit of epochs. Example: megallama data plan configs/quickstart.yaml
    """
    from megallama.checkpoint.state import seen_before
    from megallama.config.load import load_config
    from megallama.data.mixture import check_epochs, open_train
    from megallama.data.plan import plan_data, table

    config = load_config(config_path, overrides or ())
    seen = seen_before(config)
    mixture = open_train(config, seen)
    plan = plan_data(config, mixture, seen)
    typer.echo(json.dumps(plan.facts) if as_json else "\n".join(map(printable, table(plan))))
    check_epochs(mixture, config, seen)


@data_app.command("trace")
def data_trace_command(
    config_path: Config,
    overrides: Overrides = None,
    steps: Annotated[str, typer.Option(metavar="A:B", help="Steps, counted from 1, B included.")] = "1:1",
    dp: Annotated[int | None, typer.Option(min=1, help="Data-parallel size: say which rank reads a sample.")] = None,
    dp_rank: Annotated[int | None, typer.Option(min=0, help="With --dp, the samples of this rank alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Print which sample a run reads at which step: source, epoch, window and document.

    Example: megallama data trace configs/quickstart.yaml --steps 1:2
    """
    from dataclasses import asdict

    from megallama.checkpoint.state import seen_before
    from megallama.config.load import load_config
    from megallama.data.mixture import open_train
    from megallama.data.trace import parse_steps, trace

    config, wanted = load_config(config_path, overrides or ()), parse_steps(steps)
    if dp_rank is not None and dp_rank >= (dp or 0):
        raise UserError(f"--dp-rank {dp_rank} needs --dp {dp_rank + 1} or more")
    seen = seen_before(config)
    mixture = open_train(config, seen)
    longest = max(map(len, mixture.blend.names))
    for number, each in enumerate(trace(config, mixture, wanted, dp, seen)):
        facts = {name: value for name, value in asdict(each).items() if value is not None}
        if as_json:
            line = json.dumps(facts)
        else:
            widths = {name: max(len(name), longest if name == "source" else 8) for name in facts}
            line = "  ".join(f"{printable(str(value)):>{widths[name]}}" for name, value in facts.items())
            if number == 0:
                typer.echo("  ".join(name.rjust(width) for name, width in widths.items()))
        if dp_rank is None or each.rank == dp_rank:
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
