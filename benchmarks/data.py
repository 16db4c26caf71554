"""Text per second from compressed JSON lines to tokens on the disk, beside a bare tokenising loop and other programs.

The text is the source code of this Python's library and of its packages, one document per file, in eight .jsonl.zst
files. Contenders take turns for `--rounds` rounds, each in a process of its own that is timed from behind its imports:

    bare        tiktoken, with the pattern that was published for the tokenizer, over documents in memory, in a loop in
                one process
    reading     `read_blocks` alone, in one process
    megallama   `data build`, on each number of workers
    megatron    megatron-core's builder of indexed datasets behind a pool of processes, as its tools/preprocess_data.py
                has it: the main process reads, and writes what it is sent; tiktoken as in the bare loop
    datatrove   its local executor, from its JSON reader to its writer for Megatron, with the same tokenizer as a
                tokenizer.json, one thread in each process

A ratio is the median of the ratios of each round. Processor time tells more where other programs run: it is that of all
processes of a contender. Example: python benchmarks/data.py --tokenizer llama3/tokenizer.model --megabytes 100
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from io import TextIOWrapper
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tiktoken
import typer
import zstandard
from rich.console import Console
from rich.table import Table

from megallama.corpus.building.build import build_dataset
from megallama.corpus.reading.blocks import Reading, read_blocks
from megallama.data.indexed import token_dtype
from megallama.errors import UserError, refusing
from megallama.text.hf_tokenizer import save_hugging_face
from megallama.text.tokenizer import TiktokenTokenizer, Tokenizer, load_tokenizer

FILES = 8
LEAST_OF_BARE = 0.9
"""Of the bare loop, by each worker."""
LEAST_OF_PEER = 2.0
LEAST_READING = 8.0
MOST_MEMORY = 300
"""MiB of a worker."""


def write_corpus(folder: Path, megabytes: int) -> None:
    """Files 0.jsonl.zst, 1.jsonl.zst, ... that hold `megabytes` of text together, less if there is less."""
    left = megabytes * 1_000_000
    with ExitStack() as stack:
        names = [folder / f"{number}.jsonl.zst" for number in range(FILES)]
        files = [stack.enter_context(zstandard.open(name, "wb")) for name in names]
        for path, file in zip(python_files(), itertools.cycle(files)):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            left -= len(text.encode())
            if left < 0:
                return
            file.write(json.dumps({"text": text}).encode() + b"\n")


def python_files() -> Iterator[Path]:
    paths = sysconfig.get_paths()
    return itertools.chain(*(sorted(Path(paths[name]).rglob("*.py")) for name in ("stdlib", "purelib")))


Moment = tuple[float, float]


def now() -> Moment:
    """Seconds by the clock, and processor seconds of this process and of those that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)


def read_all(corpus: Path) -> Iterator[str]:
    for path in sorted(corpus.iterdir()):
        for block in read_blocks(path, Reading()):
            yield from block.documents


def published(tokenizer: TiktokenTokenizer) -> tiktoken.Encoding:
    """tiktoken with the pattern that was published for the tokenizer."""
    return tiktoken.Encoding(
        "published",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
    )


def bare(corpus: Path, tokenizer: TiktokenTokenizer, output: Path, workers: int) -> tuple[Moment, int]:
    documents, tokens = list(read_all(corpus)), 0
    encode = published(tokenizer).encode_ordinary
    began = now()
    for document in documents:
        tokens += len(encode(document)) + 1
    return began, tokens


def reading(corpus: Path, tokenizer: Tokenizer, output: Path, workers: int) -> tuple[Moment, int]:
    began = now()
    sum(1 for _ in read_all(corpus))
    return began, 0


def megallama(corpus: Path, tokenizer: Path, output: Path, workers: int) -> tuple[Moment, int]:
    began = now()
    info, _ = build_dataset([str(corpus)], str(output / "d"), str(tokenizer), workers=workers)
    return began, info.tokens


class Encoder:
    """As in Megatron-LM's tools/preprocess_data.py."""

    tokenizer: tiktoken.Encoding
    end: int

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def initializer(self) -> None:
        loaded: Any = load_tokenizer(self.spec)
        Encoder.tokenizer, Encoder.end = published(loaded), loaded.eod_id

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        text = json.loads(line)["text"]
        ids = Encoder.tokenizer.encode_ordinary(text)
        ids.append(Encoder.end)
        return ids, [len(ids)], len(line)


def megatron(corpus: Path, tokenizer: Path, output: Path, workers: int) -> tuple[Moment, int]:
    import multiprocessing

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    began, tokens = now(), 0
    dtype = token_dtype(load_tokenizer(str(tokenizer)).vocab_size)
    builder = IndexedDatasetBuilder(str(output / "d.bin"), dtype=dtype.type)
    encoder = Encoder(str(tokenizer))
    with multiprocessing.Pool(workers, initializer=encoder.initializer) as pool:
        for path in sorted(corpus.iterdir()):
            with zstandard.open(path, "rb") as file:
                for ids, lengths, _ in pool.imap(encoder.encode, TextIOWrapper(file, encoding="utf-8"), 32):
                    builder.add_document(ids, lengths)
                    tokens += len(ids)
        builder.finalize(str(output / "d.idx"))
        pool.close()
        pool.join()
    return began, tokens


def datatrove(corpus: Path, tokenizer: Path, output: Path, workers: int) -> tuple[Moment, int]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    loaded = load_tokenizer(str(tokenizer))
    save_hugging_face(loaded, output / "tokenizer")
    end, file = loaded.decode([loaded.eod_id]), str(output / "tokenizer" / "tokenizer.json")
    began = now()
    writer = MegatronDocumentTokenizer(str(output / "d"), None, file, eos_token=end, batch_size=1000)
    reader = JsonlReader(str(corpus), compression="zstd")
    LocalPipelineExecutor([reader, writer], FILES, workers, logging_dir=str(output / "logs")).run()
    size = token_dtype(loaded.vocab_size).itemsize
    return began, sum(path.stat().st_size // size for path in (output / "d").rglob("*.bin"))


CONTENDERS = {"bare": bare, "reading": reading, "megallama": megallama, "megatron": megatron, "datatrove": datatrove}


def contend(name: str, corpus: Path, spec: Path, output: Path, workers: int) -> dict[str, Any]:
    """What a contender takes, in a process of its own."""
    given: Any = load_tokenizer(str(spec)) if name in ("bare", "reading") else spec
    began, tokens = CONTENDERS[name](corpus, given, output, workers)
    seconds, cpu_seconds = (after - before for after, before in zip(now(), began, strict=True))
    who = resource.RUSAGE_CHILDREN if workers > 1 else resource.RUSAGE_SELF
    memory = resource.getrusage(who).ru_maxrss / 1024
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens, "memory_mib": memory}


def run_apart(name: str, corpus: Path, spec: Path, folder: Path, workers: int) -> dict[str, Any]:
    output = folder / "output"
    output.mkdir()
    words = [sys.executable, __file__, "--contender", name, "--workers", str(workers), "--corpus", str(corpus)]
    words += ["--tokenizer", str(spec), "--output", str(output)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"contender {name} failed: {done.stderr[-2000:]}")
    shutil.rmtree(output)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(text_bytes: int, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds: MB/s by the clock and by processor time, and both relative to the bare loop."""
    report: dict[str, Any] = {"text_megabytes": text_bytes / 1e6, "rounds": len(rounds), "contenders": {}}
    for name in rounds[0]:
        found = [(turn[name], turn["bare"]) for turn in rounds]
        ratios = [bare["seconds"] / it["seconds"] for it, bare in found]
        report["contenders"][name] = {
            "megabytes_per_second": median(text_bytes / 1e6 / it["seconds"] for it, _ in found),
            "of_bare": median(ratios),
            "of_bare_range": [min(ratios), max(ratios)],
            "processor_seconds": median(it["cpu_seconds"] for it, _ in found),
            "cpu_of_bare": median(bare["cpu_seconds"] / it["cpu_seconds"] for it, bare in found),
            "memory_mib": max(it["memory_mib"] for it, _ in found),
            "tokens": found[0][0]["tokens"],
        }
    return report


def kept(report: dict[str, Any], workers: list[int]) -> dict[str, bool]:
    """Whether each aim is met."""
    found = report["contenders"]
    aims = {"reading": found["reading"]["of_bare"] >= LEAST_READING}
    for count in workers:
        ours = found[f"megallama {count}"]
        peers = [found[name]["of_bare"] for name in (f"megatron {count}", f"datatrove {count}") if name in found]
        aims[f"bare, {count} workers"] = ours["of_bare"] >= LEAST_OF_BARE * count
        aims[f"peers, {count} workers"] = ours["of_bare"] >= LEAST_OF_PEER * max(peers, default=0.0)
        aims[f"memory, {count} workers"] = ours["memory_mib"] < MOST_MEMORY
    return aims


def print_report(report: dict[str, Any]) -> None:
    title = f"{report['text_megabytes']:.0f} MB of text, {report['rounds']} rounds"
    table = Table("", "MB/s", "of bare", "range", "processor s", "of bare by it", "MiB", "tokens", title=title)
    for name, row in report["contenders"].items():
        low, high = row["of_bare_range"]
        cells = [f"{row['megabytes_per_second']:.2f}", f"{row['of_bare']:.2f}", f"{low:.2f} - {high:.2f}"]
        cells += [f"{row['processor_seconds']:.1f}", f"{row['cpu_of_bare']:.2f}", f"{row['memory_mib']:.0f}"]
        table.add_row(name, *cells, f"{row['tokens']:,}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main(
    tokenizer: Annotated[Path, typer.Option(help="A tiktoken rank file, or a folder with one.")],
    megabytes: Annotated[int, typer.Option(help="Of text.", min=1)] = 100,
    workers: Annotated[str, typer.Option(help="Numbers of processes.")] = "1,2",
    contenders: Annotated[str, typer.Option(help="Besides bare, reading and megallama.")] = "megatron,datatrove",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    contender: Annotated[str | None, typer.Option(hidden=True)] = None,
    corpus: Annotated[Path | None, typer.Option(hidden=True)] = None,
    output: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure how fast text becomes a dataset.

    Exit code 1 if an aim is missed. Example: python benchmarks/data.py --tokenizer tokenizer.model --megabytes 100
    """
    if contender and corpus and output:
        print(json.dumps(contend(contender, corpus, tokenizer, output, int(workers))))
        return
    counts = [int(word) for word in workers.split(",")]
    names = ["megallama", *filter(None, contenders.split(","))]
    turns = [("bare", 1), ("reading", 1), *((name, count) for count in counts for name in names)]
    with tempfile.TemporaryDirectory(prefix="megallama-data-") as temporary:
        folder = Path(temporary)
        (folder / "corpus").mkdir()
        write_corpus(folder / "corpus", megabytes)
        text_bytes = sum(len(document.encode()) for document in read_all(folder / "corpus"))
        found: list[dict[str, dict[str, Any]]] = []
        for number in range(rounds):
            order = turns if number % 2 == 0 else turns[::-1]
            turn = {at: run_apart(at[0], folder / "corpus", tokenizer, folder, at[1]) for at in order}
            found.append({name if name in ("bare", "reading") else f"{name} {n}": turn[name, n] for name, n in turns})
    report = summary(text_bytes, found)
    report["aims"] = kept(report, counts)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
        for aim, met in report["aims"].items():
            print(f"{aim}: {'kept' if met else 'MISSED'}")
    raise typer.Exit(0 if all(report["aims"].values()) else 1)


if __name__ == "__main__":
    with refusing():
        typer.run(main)
