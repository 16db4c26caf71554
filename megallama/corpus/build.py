"""Text to an indexed dataset: documents are read here, tokenised in worker processes, and joined in order.

The documents are cut into blocks of about BLOCK_CHARACTERS, whatever the number of workers. Each block becomes one
shard in the folder PREFIX.parts-KEY; the shards are then joined in the order of the text, so the bytes of the dataset
do not depend on the workers, and a build that was stopped continues with the blocks that have no shard.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from rich.console import Console

from megallama.corpus.corpora import describe_source, iterate_documents
from megallama.corpus.progress import Counter
from megallama.data.indexed import (
    IndexedWriter,
    Tokens,
    bin_path,
    idx_path,
    token_dtype,
)
from megallama.data.info import DatasetInfo, info_path, open_described
from megallama.errors import UserError, check_printable
from megallama.system.lock import Lock, beside, output_lock
from megallama.system.signals import interrupt_later
from megallama.system.whole_file import put, remove_leftovers, temporary
from megallama.text.tokenizer import Tokenizer, load_tokenizer

BLOCK_CHARACTERS = 2_000_000


def build_dataset(
    sources: Sequence[str],
    prefix: str,
    tokenizer: str,
    *,
    workers: int | None = None,
    text_field: str = "text",
    force: bool = False,
    console: Console | None = None,
) -> tuple[DatasetInfo, bool]:
    """Make PREFIX.bin, PREFIX.idx and PREFIX.json; returns what they hold, and whether they stood there already.

    `tokenizer` is a specification as for `load_tokenizer`; `workers` defaults to one per CPU. UserError for sources
    that cannot be read, hold no text, or differ from those of a dataset that stands at PREFIX, unless `force`; and for
    a build that the machine stopped, which continues when it is repeated.
    """
    _check_name(prefix)
    loaded = load_tokenizer(tokenizer)
    described = [describe_source(source) for source in sources]
    inputs = _hash([described, text_field, loaded.fingerprint, BLOCK_CHARACTERS])
    rules = (tokenizer, loaded.fingerprint, loaded.vocab_size, loaded.eod_id)
    empty = DatasetInfo(*rules, documents=0, tokens=0, sources=described, inputs=inputs)
    workers = workers or os.cpu_count() or 1
    try:
        if not force and (found := _standing_dataset(prefix, inputs)):
            return found, True
        with output_lock(beside(Path(prefix)), f"--output {prefix}", "--output") as lock:
            if not force and (found := _standing_dataset(prefix, inputs)):
                return found, True
            blocks = _blocks_with_text(sources, text_field)
            for path in (bin_path(prefix), idx_path(prefix), info_path(prefix)):
                remove_leftovers(path)
            with _parts(prefix, inputs) as parts:
                shards = _tokenized(blocks, parts, tokenizer, loaded, workers)
                return _join(shards, prefix, empty, lock, console or Console(stderr=True)), False
    except BrokenProcessPool:
        raise UserError(
            f"a worker process of the build of {prefix} was killed, most likely for want of memory; the same command "
            f"continues where it stopped, and needs less memory with --workers {workers // 2}"
        ) from None
    except OSError as error:
        raise UserError(
            f"the build of --output {prefix} was stopped ({error.strerror}); mend that and repeat the command, "
            "or choose another --output"
        ) from None


def tokenize_block(documents: Sequence[str], tokenizer: Tokenizer) -> tuple[Tokens, npt.NDArray[np.int32]]:
    """Ids of the documents, each with the end of document after it, and the length of each with that end."""
    dtype = token_dtype(tokenizer.vocab_size)
    ids = [np.array([*tokenizer.encode(document), tokenizer.eod_id], dtype) for document in documents]
    return np.concatenate(ids), np.array([len(document) for document in ids], "<i4")


def _check_name(prefix: str) -> None:
    check_printable("--output", prefix)
    if os.path.basename(prefix) in ("", ".", ".."):
        raise UserError(
            f"--output {prefix!r} ends without a name for the files; use for example --output "
            f"{os.path.join(prefix, 'corpus')}"
        )


def _standing_dataset(prefix: str, inputs: str) -> DatasetInfo | None:
    """The dataset at PREFIX if it was made from `inputs`, None if there is none, UserError if it is another."""
    if not idx_path(prefix).exists():
        return None
    _, info = open_described(prefix)
    if info is None or info.inputs != inputs:
        raise UserError(
            f"{bin_path(prefix)} was made from other sources or another tokenizer; "
            "add --force to replace it or choose another --output"
        )
    return info


@contextmanager
def _parts(prefix: str, inputs: str) -> Iterator[Path]:
    """The folder of the shards; it outlasts a build that was stopped, for that to continue."""
    parts = Path(f"{prefix}.parts-{inputs[:16]}")
    parts.mkdir(parents=True, exist_ok=True)
    try:
        yield parts
    except UserError:
        shutil.rmtree(parts, ignore_errors=True)  # A source is at fault: once it is mended, these are not its shards
        raise
    # A build before this one may have been killed a moment ago, and its workers not have noticed yet.
    shutil.rmtree(parts, ignore_errors=True)


def _join(shards: Iterable[Path], prefix: str, empty: DatasetInfo, lock: Lock, console: Console) -> DatasetInfo:
    """Write the dataset of these shards; returns `empty` with their counts. UserError where `lock` was removed."""
    writer = IndexedWriter(prefix, token_dtype(empty.vocab_size))
    try:
        with Counter(console) as counter:
            for shard in shards:
                tokens, sizes = _read_shard(shard)
                writer.add(tokens, sizes)
                counter.add(len(sizes), len(tokens))
        info = replace(empty, documents=counter.documents, tokens=counter.tokens)
        writer.seal()
        lock.check()
        idx_path(prefix).unlink(missing_ok=True)  # The index vouches for the two other files: it goes first, comes last
        put(info_path(prefix), (json.dumps(asdict(info), indent=1) + "\n").encode())
        writer.close()
    finally:
        writer.discard()
    return info


def _blocks_with_text(sources: Sequence[str], text_field: str) -> Iterator[list[str]]:
    """The blocks of the sources; the first is read now, before anything is written. UserError if there is none."""
    blocks = _blocks(iterate_documents(sources, text_field))
    first = next(blocks, None)
    if first is None:
        raise UserError(f"the sources {', '.join(sources)} hold no text; name others")
    return itertools.chain([first], blocks)


def _blocks(documents: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document)
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _tokenized(
    blocks: Iterable[list[str]], parts: Path, spec: str, tokenizer: Tokenizer, workers: int
) -> Iterator[Path]:
    """The shard of each block, in order; two blocks per worker are under way, so memory stays bounded."""
    shards = ((block, parts / f"{number:06d}.npz") for number, block in enumerate(blocks))
    if workers == 1:
        for block, shard in shards:
            if not shard.exists():
                _write_shard(shard, *tokenize_block(block, tokenizer))
            yield shard
        return
    # Not fork: a copy of a process in which torch has started threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_stand_alone) as pool:
        under_way: deque[tuple[Path, Future[None]]] = deque()
        try:
            for block, shard in shards:
                with interrupt_later():  # a terminal sends it to all: a worker heeds it once it can be silent
                    under_way.append((shard, pool.submit(_work, block, spec, shard)))
                if len(under_way) > 2 * workers:
                    yield _finished(*under_way.popleft())
            while under_way:
                yield _finished(*under_way.popleft())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _stand_alone() -> None:
    """End this worker without a word at a Ctrl-C, of which its parent speaks for all, and when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(block: list[str], spec: str, shard: Path) -> None:
    if not shard.exists():
        _write_shard(shard, *tokenize_block(block, _tokenizer_of_process(spec)))


@functools.lru_cache(maxsize=1)
def _tokenizer_of_process(spec: str) -> Tokenizer:
    # Loading costs up to a second; a worker does it once, not once per block.
    return load_tokenizer(spec)


def _finished(shard: Path, work: Future[None]) -> Path:
    work.result()
    return shard


def _write_shard(shard: Path, tokens: Tokens, sizes: npt.NDArray[np.int32]) -> None:
    path = temporary(shard)
    with path.open("xb") as file:
        np.savez(file, tokens=tokens, sizes=sizes)
    path.replace(shard)


def _read_shard(shard: Path) -> tuple[Tokens, npt.NDArray[np.int32]]:
    try:
        with np.load(shard) as content:
            return content["tokens"], content["sizes"]
    except (ValueError, EOFError, KeyError, BadZipFile) as error:
        raise UserError(
            f"{shard}, which a stopped build left, is damaged ({error}) and removed; repeat the command"
        ) from None


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
