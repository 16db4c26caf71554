"""Documents as text, one at a time, from files, folders and the corpus that every Python carries.

A source is `stdlib`, a file, or a folder, which stands for all its text files in the order of their relative paths.

    .txt         one document; longer than 1 MiB, one per stretch that ends at the first blank line past 1 MiB
    .jsonl       one document per line: the text field of a JSON object
    .jsonl.gz    the same, compressed
    .jsonl.zst   the same, compressed

Text is UTF-8. Documents without text are left out.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megallama.errors import UserError
from megallama.system.regular_file import open_regular
from megallama.text.surrogates import without_surrogates

STDLIB = "stdlib"
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")

DOCUMENT_BYTES = 1 << 20
LARGEST_RECORD = 64 << 20
LARGEST_WINDOW = 1 << 27
LARGEST_GAP = 1 << 30
LONGEST_GAP = 1_000_000
"""Bytes and lines in a row without text that are read. No corpus has as many; a bomb of a few megabytes has, in any
compression, while text that repeats itself may shrink as far."""
# A few bytes of zstd can stand for 128 KiB: small input chunks bound what one call can return to about 128 MiB.
ZSTD_CHUNK = 4 << 10
CHUNK = 1 << 20


def iterate_documents(sources: Sequence[str], text_field: str = "text") -> Iterator[str]:
    """Every document of every source, in an order that does not depend on the file system; UserError as it is met."""
    for source in sources:
        for path in source_files(source):
            if source == STDLIB:
                documents = _read_source_code(path)
            elif path.suffix == ".txt":
                documents = _read_text(path)
            else:
                documents = _read_json_lines(path, text_field)
            yield from (document for document in documents if document)


def source_files(source: str) -> list[Path]:
    """The files of one source in reading order; UserError if there is none or it is of no known kind."""
    if source == STDLIB:
        return _stdlib_files()
    if not source:
        raise UserError(f"source '' names nothing; name a file, a folder, `.` for the current folder, or `{STDLIB}`")
    path = Path(source)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file()]
        if not files:
            raise UserError(f"folder {source} holds no {', '.join(SUFFIXES)} file")
        return sorted(files, key=lambda file: file.relative_to(path).as_posix())
    if not path.exists():
        raise UserError(f"source {source} does not exist; name a file, a folder or `{STDLIB}`")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"source {source} is of no known kind; known: {', '.join(SUFFIXES)}")
    return [path]


def describe_source(source: str) -> dict[str, Any]:
    """What tells this state of a source from another: files, bytes, and a hash over names, sizes and times."""
    with _refusals_named(source):
        files = source_files(source)
        states = [file.stat() for file in files]
    lines = [f"{file}\0{state.st_size}\0{state.st_mtime_ns}" for file, state in zip(files, states, strict=True)]
    return {
        "source": source,
        "files": len(files),
        "bytes": sum(state.st_size for state in states),
        "state": hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest(),
    }


@contextmanager
def _refusals_named(place: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror}); mend that or name another source") from None


def _open(path: Path) -> BinaryIO:
    with _refusals_named(path):
        return open_regular(path)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in root.rglob("*.py") if not STDLIB_LEFT_OUT.intersection(file.relative_to(root).parts)]
    if not files:
        raise UserError(f"this Python has no standard library sources for `{STDLIB}`; name a file or a folder instead")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _read_source_code(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a few files are in other encodings on purpose
        return


def _read_text(path: Path) -> Iterator[str]:
    size, lines = 0, []
    with _open(path) as file:
        for line in _lines(_chunks(file, path), path):
            lines.append(line)
            size += len(line)
            if size > DOCUMENT_BYTES and not line.strip():
                yield _decoded(b"".join(lines), path)
                size, lines = 0, []
    yield _decoded(b"".join(lines), path)


def _decoded(text: bytes, path: Path) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        bad = text[error.start : error.end]
        raise UserError(f"{path} is not UTF-8 near {bad!r}; convert it, for example with iconv") from None


def _read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    last, gap = 0, 0  # the last line with text, and the bytes since then
    with _open(path) as file:
        for number, line in enumerate(_lines(_chunks(file, path), path), start=1):
            if line.strip() and (text := _text_of(line, text_field, f"{path}:{number}")):
                last, gap = number, 0
                yield text
                continue
            gap += len(line)
            if number - last > LONGEST_GAP or gap > LARGEST_GAP:
                raise UserError(
                    f"{path} has {number - last:,} lines of {gap:,} bytes in a row without text after line {last}: "
                    "refused as a bomb; take them out"
                )


def _text_of(line: bytes, text_field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except RecursionError:
        raise UserError(f"{place} is no JSON object of text: it is nested too deeply; take the line out") from None
    except ValueError as error:
        raise UserError(f"{place} is no JSON object: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place} is {_json_type(record)}, not a JSON object; write it as {{{text_field!r}: ...}}")
    if text_field not in record:
        found = ", ".join(sorted(record)[:8])
        raise UserError(
            f"{place} has no text in field {text_field!r}, only {found or 'nothing'}; name it: --text-field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(
            f"{place} has {_json_type(text)} in field {text_field!r}, not text; take the line out, or name another "
            "field: --text-field"
        )
    return without_surrogates(text)  # JSON can escape half a surrogate pair


def _json_type(value: object) -> str:
    """What JSON calls it."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _chunks(file: Any, path: Path) -> Iterator[bytes]:
    """Decompressed content in pieces of bounded size."""
    try:
        if path.suffix == ".zst":
            yield from _zstd_chunks(file)
        elif path.suffix == ".gz":
            with gzip.open(file) as unzipped:
                while chunk := unzipped.read(CHUNK):
                    yield chunk
        else:
            while chunk := file.read(CHUNK):
                yield chunk
    except (zstandard.ZstdError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from None


def _zstd_chunks(file: Any) -> Iterator[bytes]:
    """All frames of a zstd file. Not `stream_reader`: that ends in silence where a file is cut short."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    frame = None
    while rest := file.read(ZSTD_CHUNK):
        while rest:
            frame = frame or decompressor.decompressobj()
            chunk = frame.decompress(rest)
            rest = b""
            if frame.eof:
                rest, frame = frame.unused_data, None
            for start in range(0, len(chunk), CHUNK):
                yield chunk[start : start + CHUNK]
    if frame is not None:
        raise EOFError("the last zstd frame has no end")


def _lines(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Lines with their ends, from pieces of any size."""
    begun: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *more = chunk.splitlines(keepends=True) or [b""]
        for line in (first, *more):
            begun.append(line)
            size += len(line)
            if size > LARGEST_RECORD:
                raise UserError(f"{path} has a line of more than {LARGEST_RECORD >> 20} MiB; split it")
            if line.endswith(b"\n"):
                yield b"".join(begun)
                begun, size = [], 0
    if begun:
        yield b"".join(begun)
