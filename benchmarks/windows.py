"""Time batches of windows of one dataset: megallama's loader beside what one would take instead.

A batch is 8 windows of 2,049 tokens from many documents, in shuffled order: int64 inputs and labels of 2,048, each of
them contiguous. All contenders live in this process, with one thread and no workers, and read the same uint16 ids from
files that the machine has in memory:

    ours            `open_data` and its `train.step`
    megatron-core   `GPTDataset` on the same files; it shuffles documents too, before it cuts windows
    litdata         `StreamingDataset` with `TokensLoader`, on a copy in its own format
    memmap          numpy's memmap in the order of a permutation: what a loader can at best do

They take turns, back and forth, of an epoch each, and open the dataset anew in each: `cold` is the time from then to
the first batch, with all that is built for it, and `warm` that of any other batch. What each reads first of all is
looked at, not timed. Example: python benchmarks/windows.py --megatokens 20 --rounds 7 --json
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from contenders import apart, megatron
from numpy.typing import NDArray
from rows.table import Aim, Found, Line, median_ratio, print_table, spread
from torch import Tensor

from megallama.config.load import load_config
from megallama.data.indexed import IndexedWriter, bin_path, token_dtype
from megallama.data.loader import open_data
from megallama.data.sampler import num_windows
from megallama.layout.topology import Topology

CONFIG = Path(__file__).with_name("bench.yaml")
BATCH, LENGTH, VOCABULARY, END = 8, 2048, 32_000, 0
LOOKED_AT = 32
"""Batches."""

Batch = tuple[Tensor, Tensor]
"""Inputs and labels, [BATCH, LENGTH]."""
Open = Callable[[], Iterator[Batch]]


def write_documents(prefix: Path, tokens: int) -> int:
    """About so many ids in documents of 200 to 1,800, which count up from any id and end with END; how many."""
    draw, dtype = np.random.default_rng(0), token_dtype(VOCABULARY)
    sizes = draw.integers(200, 1801, tokens // 1000).astype("<i4")
    ends = np.cumsum(sizes)
    counted = np.arange(ends[-1]) + np.repeat(draw.integers(VOCABULARY, size=len(sizes)), sizes)
    ids = (counted % (VOCABULARY - 1) + 1).astype(dtype)
    ids[ends - 1] = END
    writer = IndexedWriter(str(prefix), dtype)
    writer.add(ids, sizes)
    writer.close()
    return len(ids)


def split(rows: NDArray[Any]) -> Batch:
    """Of [BATCH, LENGTH + 1] ids."""
    ids = torch.from_numpy(rows.astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def ours(prefix: Path) -> Open:
    shape = (f"model.vocab_size={VOCABULARY}", f"model.max_position_embeddings={LENGTH}")
    batch = (f"data.sequence_length={LENGTH}", f"train.micro_batch_size={BATCH}", f"train.global_batch_size={BATCH}")
    config = load_config(CONFIG, [f"data.path={prefix}", *shape, *batch])

    def opened() -> Iterator[Batch]:
        loader = open_data(config, Topology(), 0).train
        for position in count(step=BATCH):
            (micro_batch,) = loader.step(position)
            yield micro_batch.tokens, micro_batch.labels

    return opened


def megatron_core(prefix: Path) -> Open:
    def opened() -> Iterator[Batch]:
        with tempfile.TemporaryDirectory() as cache:
            dataset = megatron.gpt_dataset(prefix, cache, LENGTH, VOCABULARY, END)
            for first in range(0, len(dataset), BATCH):
                samples = [dataset[number] for number in range(first, first + BATCH)]
                yield torch.stack([it["tokens"] for it in samples]), torch.stack([it["labels"] for it in samples])

    return opened


def litdata(prefix: Path) -> Open:
    rows = apart.litdata_rows(prefix, prefix.with_name("litdata"), LENGTH + 1)

    def opened() -> Iterator[Batch]:
        reading = rows()
        while True:
            yield split(np.stack([next(reading) for _ in range(BATCH)]))

    return opened


def memmap(prefix: Path) -> Open:
    def opened() -> Iterator[Batch]:
        ids = np.memmap(bin_path(str(prefix)), token_dtype(VOCABULARY), "r")
        starts = LENGTH * np.random.default_rng(0).permutation(num_windows(len(ids), LENGTH))
        for first in range(0, len(starts), BATCH):
            yield split(np.stack([ids[start : start + LENGTH + 1] for start in starts[first : first + BATCH]]))

    return opened


MAKERS = {"ours": ours, "megatron-core": megatron_core, "litdata": litdata, "memmap": memmap}


def faults(batches: list[Batch]) -> list[str]:
    """What is wrong with the batches that a contender begins with."""
    for ids in (each for batch in batches for each in batch):
        if ids.shape != (BATCH, LENGTH) or ids.dtype != torch.int64 or not ids.is_contiguous():
            return [f"gives {ids.dtype} {tuple(ids.shape)}"]
    inputs, labels = (torch.cat(each) for each in zip(*batches, strict=True))
    within = (inputs != END) & (labels != END)
    found = []
    if not torch.equal(inputs[:, 1:], labels[:, :-1]):
        found.append("has labels that are not the next inputs")
    if not torch.equal(labels[within], inputs[within] % (VOCABULARY - 1) + 1) or within.float().mean() < 0.99:
        found.append("gives other ids than the documents have")
    if len(inputs.unique(dim=0)) < len(inputs):
        found.append("repeats windows")
    step = (inputs[1:, 0] - labels[:-1, -1]) % (VOCABULARY - 1)
    if (step <= 1).float().mean() > 0.5:
        found.append("is not shuffled")
    return found


def turn(opened: Open, batches: int) -> list[float]:
    """Seconds of each batch; the first of them include the opening."""
    moments, reading = [time.perf_counter()], opened()
    for _ in range(batches):
        next(reading)
        moments.append(time.perf_counter())
    found: list[float] = np.diff(moments).tolist()
    return found


def lines(turns: dict[str, list[list[float]]]) -> Iterator[Line]:
    """Of every contender `warm` and `cold`; the floor is that of what is warm."""
    for name, rounds in turns.items():
        for what, part in (("warm", slice(1, None)), ("cold", slice(1))):
            warm, seconds = what == "warm", [second for batches in rounds for second in batches[part]]
            by_round = {each: [median(batches[part]) for batches in turns[each]] for each in (name, "ours", "memmap")}
            speed = 1 / median(seconds)
            yield Line(
                *("C7", f"{name}, {what}", median(seconds), "ms", spread(seconds)),
                ratio=None if name == "ours" else median_ratio(by_round["ours"], by_round[name]),
                of_floor=median_ratio(by_round["memmap"], by_round[name]) if warm else None,
                counted=f"{speed:,.0f} batches/s, {BATCH * LENGTH * speed / 1e6:.1f}M tokens/s" if warm else "",
            )


def measured(folder: Path, megatokens: int, rounds: int) -> Found:
    """All contenders that run here."""
    prefix, found, made = folder / "documents", Found(), dict[str, Open]()
    tokens = write_documents(prefix, megatokens * 1_000_000)
    for name, make in MAKERS.items():
        try:
            opened = make(prefix)
            found.wrong += [f"{name} {fault}" for fault in faults([*islice(opened(), LOOKED_AT)])]
            made[name] = opened
        except ImportError as error:
            found.notes.append(f"{name} is left out: {type(error).__name__}: {error}")
    turns: dict[str, list[list[float]]] = {name: [] for name in made}
    for number in range(rounds):
        for name in list(made) if number % 2 == 0 else list(reversed(made)):
            turns[name].append(turn(made[name], tokens // (BATCH * (LENGTH + 1)) - 1))
    found.lines += lines(turns)
    aims = {line.contender: line.ratio for line in found.lines}
    if (ratio := aims.get("megatron-core, warm")) is not None:
        found.aims.append(Aim("loader time, of megatron-core's", ratio, 1.0))
    return found


def main(
    megatokens: Annotated[int, typer.Option(help="Millions of tokens of the dataset.", min=1)] = 20,
    rounds: Annotated[int, typer.Option(help="Turns of each contender.", min=1)] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure and print; exit code 1 if batches of a contender are not what they should be."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="megallama-windows-") as folder:
        found = measured(Path(folder), megatokens, rounds)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        print_table({"C7": found})
    raise typer.Exit(1 if found.wrong else 0)


if __name__ == "__main__":
    typer.run(main)
