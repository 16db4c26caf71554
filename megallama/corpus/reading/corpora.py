"""What a source stands for: files in an order that does not depend on the file system.

A source is `stdlib`, the corpus that every Python carries; a file; a folder, which stands for all files of a known kind
below it; or a pattern such as `data/**/*.jsonl`, which stands for all such files and folders that match. Files,
folders and patterns may be behind URLs that `system.remote` reads.

    .txt         one document; longer than 1 MiB, one per stretch that ends at the first blank line past 1 MiB
    .jsonl       one document per line: the text field of a JSON object
    .jsonl.gz    the same, compressed
    .jsonl.zst   the same, compressed
    .parquet     one document per row: a column of text
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megallama.corpus.reading.blocks import Reading, read_blocks
from megallama.corpus.reading.lines import refusals_named
from megallama.errors import UserError
from megallama.system.remote import SourcePath, is_url, remote_files, source_state

STDLIB = "stdlib"
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def iterate_documents(sources: Sequence[str], text_field: str = "text") -> Iterator[str]:
    """Every document of every source, in an order that does not depend on the file system; UserError as it is met."""
    reading = Reading(text_field)
    for source in sources:
        for path in source_files(source):
            for block in read_blocks(path, reading):
                yield from block.documents


def source_files(source: str) -> Sequence[SourcePath]:
    """The files of one source in reading order; UserError if there is none or it is of no known kind."""
    if source == STDLIB:
        return _stdlib_files()
    if not source:
        raise UserError(f"source '' names nothing; name a file, a folder, `.` for the current folder, or `{STDLIB}`")
    if is_url(source):
        return _remote_files(source)
    path = Path(source)
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise UserError(f"folder {source} holds no {', '.join(SUFFIXES)} file")
        return files
    if path.exists():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"source {source} is of no known kind; known: {', '.join(SUFFIXES)}")
        return [path]
    if not any(character in source for character in "*?["):
        raise UserError(
            f"source {source} does not exist; name a file, a folder, a pattern such as data/**/*.jsonl, or `{STDLIB}`"
        )
    return _matching_files(path)


def _files_below(folder: Path) -> list[Path]:
    """In the order of their relative paths; UserError where a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); mend that or name another source")

    files = [Path(parent, name) for parent, _, names in os.walk(folder, onerror=refuse) for name in names]
    return sorted(filter(_is_text, files), key=lambda file: file.relative_to(folder).as_posix())


def _is_text(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and (path.is_file() or path.is_symlink())  # a broken link is missed when read


def _matching_files(pattern: Path) -> list[Path]:
    try:
        found = list(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    except ValueError as error:
        raise UserError(f"source {pattern} is no pattern of files ({error}); use for example data/**/*.jsonl") from None
    files = {file for path in found for file in (_files_below(path) if path.is_dir() else [path])}
    texts = sorted(filter(_is_text, files), key=Path.as_posix)
    if not texts:
        raise UserError(f"source {pattern} matches no {', '.join(SUFFIXES)} file")
    return texts


def describe_source(source: str) -> dict[str, Any]:
    """What tells this state of a source from another: files, bytes, and a hash over names, sizes and times."""
    with refusals_named(source):
        files = source_files(source)
        states = [source_state(file) for file in files]
    lines = [f"{file}\0{size}\0{state}" for file, (size, state) in zip(files, states, strict=True)]
    return {
        "source": source,
        "files": len(files),
        "bytes": sum(size for size, _ in states),
        "state": hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest(),
    }


def _remote_files(source: str) -> Sequence[SourcePath]:
    with refusals_named(source):
        files = remote_files(source, SUFFIXES)
    if not files:
        raise UserError(f"{source} holds no {', '.join(SUFFIXES)} file; name a file, a folder or a pattern there")
    return files


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in root.rglob("*.py") if not STDLIB_LEFT_OUT.intersection(file.relative_to(root).parts)]
    if not files:
        raise UserError(f"this Python has no standard library sources for `{STDLIB}`; name a file or a folder instead")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())
