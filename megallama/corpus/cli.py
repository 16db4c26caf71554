"""`megallama data ...` and `megallama tokenizer ...`."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from megallama.errors import UserError, printable

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...", help="`stdlib`, a .txt, .jsonl, .jsonl.gz or .jsonl.zst file, a folder, or a URL."
    ),
]
TextField = Annotated[str, typer.Option(help="JSON field that holds the text.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Config file of a run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

TOKENIZERS = "`bytes`, a tiktoken encoding, a rank file, a folder or hf:FILE, a tokenizer.json."


class OnError(Enum):
    """What a broken document does to a build."""

    STOP = "stop"
    SKIP = "skip"


data_app = typer.Typer(help="Build and inspect datasets.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train and inspect tokenizers.", no_args_is_help=True)


@data_app.command("build")
def build_command(
    sources: Sources,
    output: Annotated[str, typer.Option(metavar="PREFIX", help="Write PREFIX.bin, PREFIX.idx and PREFIX.json.")],
    tokenizer: Annotated[str, typer.Option(help=TOKENIZERS)] = "bytes",
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes. Default: one per CPU.")] = None,
    text_field: TextField = "text",
    min_length: Annotated[int, typer.Option(min=1, help="Leave out documents of fewer characters.")] = 1,
    on_error: Annotated[OnError, typer.Option(help="Stop at a broken document, or leave it out and count it.")] = (
        OnError.STOP
    ),
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Keep the first of equal documents.")] = False,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Build part I of N only, for `megallama data merge PREFIX`.")
    ] = None,
    force: Force = False,
) -> None:
    """Build a dataset from text. An output that was built from the same inputs is kept.

    Example: megallama data build stdlib --output data/stdlib --tokenizer data/tokenizer
    """
    from megallama.corpus.building.build import build_dataset, build_part, parse_part, part_folder
    from megallama.corpus.fetching.upload import check_on_disk, local_output
    from megallama.corpus.reading.blocks import Reading

    begin = time.monotonic()
    reading = Reading(text_field, min_length, on_error.value)
    options: dict[str, Any] = {"workers": workers, "reading": reading, "deduplicate": deduplicate, "force": force}
    if part is None:
        with local_output(output, force=force) as prefix:
            info, reused = build_dataset(sources, prefix, tokenizer, **options)
        typer.echo(f"{output}: {info.documents:,} documents, {info.tokens:,} tokens, {_done(reused, begin)}")
        _print_left_out(info.left_out)
        return
    which = parse_part(part)
    check_on_disk("--output", output)
    documents, tokens, reused = build_part(sources, output, tokenizer, which, **options)
    folder = part_folder(output, which)
    typer.echo(f"{folder}: {documents:,} documents, {tokens:,} tokens, {_done(reused, begin)}")


@data_app.command("merge")
def merge_command(
    output: Annotated[str, typer.Argument(metavar="PREFIX", help="As in `data build --output PREFIX --part I/N`.")],
    force: Force = False,
) -> None:
    """Make one dataset of the parts that `data build --part` built, and remove them.

    Example: megallama data merge data/stdlib
    """
    from megallama.corpus.building.merge import merge_parts
    from megallama.corpus.fetching.upload import check_on_disk

    check_on_disk("PREFIX", output)
    info, reused = merge_parts(output, force=force)
    done = "kept, its inputs are the same" if reused else "merged"
    typer.echo(f"{output}: {info.documents:,} documents, {info.tokens:,} tokens, {done}")
    _print_left_out(info.left_out)


def _done(reused: bool, begin: float) -> str:
    return "kept, its inputs are the same" if reused else f"built in {time.monotonic() - begin:.1f} s"


def _print_left_out(left_out: Mapping[str, int]) -> None:
    if left_out:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
        typer.echo(f"left out: {counts}")


@data_app.command("fetch")
def fetch_command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A corpus, hf://datasets/OWNER/NAME/PATH or a URL. Default: list them."),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: data/NAME.")] = None,
    files: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Files of the dataset to fetch instead; repeatable.")
    ] = None,
    shards: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first N files.")] = None,
    sha256: Annotated[str | None, typer.Option(metavar="HASH", help="SHA-256 that the one file must have.")] = None,
    force: Force = False,
) -> None:
    """Fetch a public corpus, or any file of the network. A fetch that was stopped is continued.

    Example: megallama data fetch tinystories
    """
    from rich.console import Console

    from megallama.corpus.fetching.fetch import default_folder, fetch, wanted_files
    from megallama.corpus.fetching.fetch_progress import FetchProgress
    from megallama.corpus.fetching.public import PUBLIC_CORPORA

    if name is None:
        for each, corpus in PUBLIC_CORPORA.items():
            typer.echo(f"{each:19} {corpus.size}, {corpus.licence}")
            typer.echo(f"{'':19} {corpus.content}; {corpus.repository}")
        return
    wanted = wanted_files(name, files or (), shards, sha256)
    done = fetch(wanted, output or default_folder(name), FetchProgress(Console(stderr=True)), force=force)
    kept = f", {done.files - done.new} of them kept" if done.new < done.files else ""
    typer.echo(f"{done.folder}: {done.files} {'file' if done.files == 1 else 'files'}, {done.size / 1e6:,.1f} MB{kept}")
    corpus_prefix = shlex.quote(str(done.folder / "corpus"))
    typer.echo(f"next: megallama data build {shlex.quote(str(done.folder))} --output {corpus_prefix} --tokenizer gpt2")


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
