"""Text to an indexed dataset: every worker reads and tokenises blocks of the files itself, and the shards are joined.

What one block gives does not depend on who reads it, and the shards are joined in the order of the text, so the bytes
of the dataset do not depend on the workers or the parts. Shards are kept in PREFIX.parts, or in PREFIX.part-I-of-N, so
a build that was stopped continues with the blocks that have none.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from rich.console import Console

from megallama.corpus.building.join import join, remove_unfinished
from megallama.corpus.building.progress import Progress
from megallama.corpus.building.recipe import Recipe, Share, make_recipe, recipe_from_json
from megallama.corpus.building.shard import Counts, Shard
from megallama.corpus.building.shards import Shards
from megallama.corpus.building.workers import Here, Job, Made, Task, Team, WorkerLostError, Workers
from megallama.corpus.reading.blocks import Reading
from megallama.data.indexed import bin_path, idx_path
from megallama.data.info import DatasetInfo, open_described
from megallama.errors import UserError, check_printable
from megallama.system.lock import beside, output_lock
from megallama.system.whole_file import put
from megallama.text.checked import EncodersDifferError, checked_encoder
from megallama.text.tokenizer import Tokenizer

PART_NAME = "part.json"
"""In the folder of a part: what was built, written when all of it is there."""


def build_dataset(
    sources: Sequence[str],
    prefix: str,
    tokenizer: str,
    *,
    workers: int | None = None,
    reading: Reading | None = None,
    deduplicate: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> tuple[DatasetInfo, bool]:
    """Make PREFIX.bin, PREFIX.idx and PREFIX.json; returns what they hold, and whether they stood there already.

    `tokenizer` is a specification as for `load_tokenizer`; `workers` defaults to one per CPU. UserError for sources
    that cannot be read, hold no text, or differ from those of a dataset that stands at PREFIX, unless `force`; and for
    a build that the machine stopped, which continues when it is repeated.
    """
    check_prefix(prefix)
    recipe, loaded = make_recipe(sources, tokenizer, reading or Reading(), deduplicate=deduplicate)
    workers = workers or os.cpu_count() or 1
    with stopped_builds_explained(prefix, workers):
        shards = Shards(Path(f"{prefix}.parts"), recipe)
        if not force and (found := standing_dataset(prefix, recipe)) and not shards.folder.exists():
            return found, True
        with output_lock(beside(Path(prefix)), f"--output {prefix}", "--output") as lock:
            remove_unfinished(prefix)
            if not force and (found := standing_dataset(prefix, recipe)):
                shards.remove()  # the build that made it was killed before it could
                return found, True
            try:
                with _Building(shards, recipe, loaded, (0, 1), workers, console or Console(stderr=True)) as building:
                    info = join(building.in_order, recipe, building.hashes, prefix, shards.folder, lock)
            except FileNotFoundError:
                lock.check()  # whoever removed it may have made the same output, and removed the shards
                raise
            shards.remove()
            return info, False


def build_part(
    sources: Sequence[str],
    prefix: str,
    tokenizer: str,
    part: Share,
    *,
    workers: int | None = None,
    reading: Reading | None = None,
    deduplicate: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> tuple[int, int, bool]:
    """Make part I of N of what `build_dataset` makes, `part` being (I - 1, N), in the folder PREFIX.part-I-of-N.

    Returns its documents and tokens, before duplicates are dropped, and whether it stood there already. UserError as
    `build_dataset`.
    """
    check_prefix(prefix)
    recipe, loaded = make_recipe(sources, tokenizer, reading or Reading(), deduplicate=deduplicate)
    workers = workers or os.cpu_count() or 1
    folder = part_folder(prefix, part)
    done = folder / PART_NAME
    with stopped_builds_explained(str(folder), workers), output_lock(beside(folder), f"part {folder}", "--output"):
        if not force and (found := _standing_part(done, recipe)):
            return *found, True
        if done.exists():
            remove_part(folder)
        shards = Shards(folder, recipe)
        with _Building(shards, recipe, loaded, part, workers, console or Console(stderr=True)) as building:
            documents, tokens = building.finish()
        content = {"part": part, "documents": documents, "tokens": tokens, "recipe": asdict(recipe)}
        put(done, json.dumps(content).encode())
    return documents, tokens, False


def parse_part(part: str) -> Share:
    """(I - 1, N) of "I/N"; UserError if it is no part."""
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--part {part} is no part; the first of four is --part 1/4, the last --part 4/4")
    return int(number) - 1, int(count)


def part_folder(prefix: str, part: Share) -> Path:
    """Where a part is; (0, 4) is the first of four."""
    return Path(f"{prefix}.part-{part[0] + 1}-of-{part[1]}")


def remove_part(folder: Path) -> None:
    """The file that says a part is whole goes last: until then a command that was killed here is repeated."""
    for path in folder.iterdir():
        if path.name != PART_NAME:
            path.unlink()
    shutil.rmtree(folder)


def check_prefix(prefix: str) -> None:
    """UserError if PREFIX names no files."""
    check_printable("--output", prefix)
    if os.path.basename(prefix) in ("", ".", ".."):
        raise UserError(
            f"--output {prefix!r} ends without a name for the files; use for example --output "
            f"{os.path.join(prefix, 'corpus')}"
        )


def standing_dataset(prefix: str, recipe: Recipe) -> DatasetInfo | None:
    """The dataset at PREFIX if it was made by `recipe`, None if there is none, UserError if it is another."""
    if not idx_path(prefix).exists():
        return None
    _, info = open_described(prefix)
    if info is None or info.inputs != recipe.inputs:
        raise UserError(
            f"{bin_path(prefix)} was made from other sources or another tokenizer, or by other rules; "
            "add --force to replace it or choose another --output"
        )
    return info


@contextmanager
def stopped_builds_explained(prefix: str, workers: int) -> Iterator[None]:
    """UserError for what the machine does to a build."""
    try:
        yield
    except WorkerLostError:
        raise UserError(
            f"a worker process of the build of {prefix} was killed, most likely for want of memory; the same command "
            f"continues where it stopped, and needs less memory with --workers {max(1, workers // 2)}"
        ) from None
    except MemoryError:
        raise UserError(
            f"there is not enough memory for the build of {prefix}; the same command continues where it stopped, and "
            f"needs less with --workers {max(1, workers // 2)}"
        ) from None
    except OSError as error:
        raise UserError(
            f"the build of --output {prefix} was stopped ({error.strerror or error}); mend that and repeat the "
            "command, or choose another --output"
        ) from None


def _standing_part(done: Path, recipe: Recipe) -> tuple[int, int] | None:
    try:
        found = json.loads(done.read_bytes())
        made, counts = recipe_from_json(found["recipe"]), (found["documents"], found["tokens"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if made.inputs != recipe.inputs:
        raise UserError(
            f"{done.parent} was made from other sources or another tokenizer, or by other rules; "
            "add --force to replace it or choose another --output"
        )
    return counts


class _Building:
    """The shards of one part, as they come to stand."""

    def __init__(
        self, shards: Shards, recipe: Recipe, tokenizer: Tokenizer, part: Share, workers: int, console: Console
    ) -> None:
        self._shards, self._recipe, self._tokenizer, self._workers = shards, recipe, tokenizer, workers
        self._work = list(recipe.work(part))
        self._there: defaultdict[str, set[int]] = defaultdict(set)
        """Numbers of the blocks of a unit whose shards stand."""
        self._open = Counter[str]()
        """Tasks of a unit that are not done."""
        self._blocks = Counter[str]()
        self._hashes: dict[str, list[str]] = {}
        self._units = {unit.key: unit for unit, _ in self._work}
        self._progress = Progress(console, sum(unit.bytes // count for unit, (_, count) in self._work))
        self._team: Team = Here((), self._job, tokenizer)  # until it is known what is to be done

    @property
    def _job(self) -> Job:
        recipe = self._recipe
        return Job(self._shards.folder, recipe.reading, recipe.dtype, recipe.deduplicate)

    def __enter__(self) -> _Building:
        self._shards.folder.mkdir(parents=True, exist_ok=True)
        self._shards.remove_leftovers()
        tasks = list(self._tasks())
        workers = min(self._workers, sum(task.share is not None for task in tasks))
        self._progress.__enter__()
        team = (tasks, self._job, checked_encoder(self._tokenizer) if workers else self._tokenizer)
        self._team = Workers(*team, workers) if workers > 1 else Here(*team)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        self._team.close()
        if isinstance(error, EncodersDifferError):
            self._shards.remove()
        if kind and not self._progress.documents and self._shards.standing().keys() <= self._units.keys():
            self._shards.remove()  # nothing in it is worth another command, be it by other rules

    def _tasks(self) -> Iterator[Task]:
        """What is left to do."""
        standing = self._shards.standing()
        total = sum(unit.bytes // count for unit, (_, count) in self._work)
        for unit, (number, count) in self._work:
            for block in standing.get(unit.key, ()):
                if shard := self._shards.read_again(unit, block):
                    self._stands(unit.key, block, shard.counts)
            there = frozenset(self._there[unit.key])
            blocks = self._shards.noted(unit, "blocks")
            if blocks is None or not there.issuperset(range(number, blocks, count)):
                hands = unit.shares(self._workers, total)
                self._open[unit.key] = hands
                for hand in range(hands):
                    yield Task(unit, (number + count * hand, count * hands), there)
            else:
                self._progress.read(unit.bytes // count)
            if (hashes := self._shards.noted(unit, "sha256")) is not None:
                self._hashes[unit.key] = hashes
            elif unit.number % count == number:
                yield Task(unit, None, frozenset())

    def in_order(self) -> Iterator[Shard]:
        """All shards of a build in one part; each as soon as it stands and those before it have been taken."""
        for unit in self._recipe.units:
            for number in itertools.count():
                while number not in self._there[unit.key] and self._open[unit.key]:
                    self._take()
                if number not in self._there[unit.key]:
                    break
                if (shard := self._shards.read(unit, number)) is None:
                    raise FileNotFoundError(errno.ENOENT, f"{self._shards.folder} was removed")
                yield shard
                self._take(block=False)

    def finish(self) -> tuple[int, int]:
        """Wait for all of it; returns documents and tokens. UserError if a source was changed meanwhile."""
        while self._take():
            pass
        self._recipe.check_unchanged()
        return self._progress.documents, self._progress.tokens

    def hashes(self) -> dict[str, list[str]]:
        """SHA-256 of the files of each unit, when all is done."""
        self.finish()
        return self._hashes

    def _take(self, *, block: bool = True) -> bool:
        """Heed what the workers say; whether they work still."""
        messages = self._team.messages(block=block)
        for message in messages or ():
            unit = self._units[message.unit]
            self._progress.read(message.read)
            if isinstance(message, Made):
                self._stands(unit.key, message.number, message.counts)
            elif message.share is None:
                self._hashes[unit.key] = list(message.sha256)
                self._shards.note(unit, "sha256", message.sha256)
            else:
                self._open[unit.key] -= 1
                self._blocks[unit.key] = max(self._blocks[unit.key], message.blocks)
                if not self._open[unit.key]:
                    self._shards.note(unit, "blocks", self._blocks[unit.key])
        self._progress.show()
        return messages is not None

    def _stands(self, key: str, block: int, counts: Counts) -> None:
        self._there[key].add(block)
        self._progress.add(counts)
