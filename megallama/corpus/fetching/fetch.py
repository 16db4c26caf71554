"""Public corpora and other files of the network, into a folder: `megallama data fetch`.

FOLDER/fetched.json says of each file that is complete where it came from, its size and its SHA-256. The same command
keeps those and continues with the others.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from megallama.corpus.fetching.download import Digest, Told, Wanted, checked, download
from megallama.corpus.fetching.fetch_progress import FetchProgress
from megallama.corpus.fetching.public import PUBLIC_CORPORA, PublicCorpus
from megallama.corpus.reading.corpora import SUFFIXES
from megallama.errors import UserError, check_printable
from megallama.system.lock import output_lock
from megallama.system.whole_file import put, remove_leftovers

RECORD = "fetched.json"
LOCK = ".lock"


@dataclass(frozen=True)
class Fetched:
    """A file that is complete: a value of RECORD."""

    url: str
    size: int
    sha256: str
    modified_ns: int
    """When it was written here: a file of this size and time is not read again."""


@dataclass(frozen=True)
class Outcome:
    """What a fetch has done."""

    folder: Path
    files: int
    new: int
    size: int


def wanted_files(name: str, files: Sequence[str], shards: int | None, sha256: str | None) -> list[Wanted]:
    """What `name` means: a corpus of PUBLIC_CORPORA, hf://datasets/..., or a URL. UserError if it means nothing."""
    if sha256 is not None and (len(sha256) != 64 or not set(sha256.lower()) <= set("0123456789abcdef")):
        raise UserError(f"--sha256 {sha256} is no SHA-256: give 64 hexadecimal digits")
    if name.lower().startswith(("http://", "https://")):
        if files or shards:
            raise UserError(f"{name} is one file; leave {'--files' if files else '--shards'} out")
        found = [Wanted(name, _name_in(name))]
    else:
        found = _of_the_hub(name, files)[: shards or None]
    if sha256 is not None:
        if len(found) > 1:
            raise UserError(f"--sha256 is of one file, and {name} has {len(found)}; leave it out, the hub has theirs")
        found = [replace(found[0], digest=Digest("sha256", sha256.lower()))]
    for file in found:
        if not file.name.isprintable() or ".." in PurePosixPath(file.name).parts or file.name.startswith("/"):
            raise UserError(f"{name} names a file {file.name!r}, which leads out of the output folder; leave it out")
        if file.name in (RECORD, LOCK):
            raise UserError(f"{name} names a file {file.name}, which a fetch keeps for itself; leave it out")
    return found


def default_folder(name: str) -> Path:
    """Where the files go without --output: data/ and the name."""
    if name in PUBLIC_CORPORA:
        return Path("data") / name
    if name.lower().startswith(("http://", "https://")):
        return Path("data") / _name_in(name).partition(".")[0]
    return Path("data") / name.removeprefix("hf://datasets/").split("/")[1].partition("@")[0]


def fetch(wanted: Sequence[Wanted], folder: Path, progress: FetchProgress, *, force: bool = False) -> Outcome:
    """Bring all files into the folder. UserError as of `download`, for a disk that is too small or full, another
    content under one of the names (unless `force`), and a second fetch into the folder.
    """
    check_printable("--output", str(folder))
    try:
        with output_lock(folder / LOCK, f"--output {folder}", "--output"):
            remove_leftovers(folder / RECORD)
            record = _read_record(folder)
            missing = [file for file in wanted if not _is_there(file, folder, record, force)]
            _check_space(missing, folder)
            with progress:
                for number, file in enumerate(missing, start=1):
                    with progress.file(file.name, number, len(missing)) as told:
                        record[file.name] = _bring(file, folder / file.name, told)
                    _write_record(folder, record)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of --output {folder} is full; free some space and repeat the command, which continues, or "
                "choose another --output"
            ) from None
        place = error.filename or folder
        raise UserError(f"{place} cannot be written ({error.strerror}); mend that or choose another --output") from None
    return Outcome(folder, len(wanted), len(missing), sum(record[file.name].size for file in wanted))


def _of_the_hub(name: str, files: Sequence[str]) -> list[Wanted]:
    try:
        from megallama.corpus.fetching.hub import HubPath, hub_files
    except ValueError as error:  # huggingface_hub parses HF_ENDPOINT when it is imported
        raise UserError(
            f"HF_ENDPOINT={os.environ.get('HF_ENDPOINT')} is no URL ({error}); unset it, or name a mirror as "
            "https://..."
        ) from None

    corpus = PUBLIC_CORPORA.get(name)
    if corpus is None and not name.startswith("hf://"):
        raise UserError(
            f"{name} is no corpus that is known: {', '.join(PUBLIC_CORPORA)}; or give hf://datasets/OWNER/NAME/PATH or "
            "https://..."
        )
    place = HubPath(corpus.repository, "main", corpus.files) if corpus else HubPath.parse(name)
    if files and corpus is None and place.path:
        raise UserError(f"{name} names its files; leave --files out, or the path {place.path}")
    places = [HubPath(place.repository, place.revision, pattern) for pattern in files] or [place]
    found = {file.name: file for each in places for file in hub_files(each, SUFFIXES)}
    return [_renamed(found[name], corpus) for name in sorted(found)]


def _renamed(file: Wanted, corpus: PublicCorpus | None) -> Wanted:
    if corpus is None or corpus.renamed is None or not file.name.endswith(corpus.renamed[0]):
        return file
    return replace(file, name=file.name.removesuffix(corpus.renamed[0]) + corpus.renamed[1])


def _name_in(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UserError(f"{url} is no address ({error})") from None
    name = PurePosixPath(unquote(parts.path)).name
    if not parts.hostname or not name:
        raise UserError(f"{url} names no file; give an address as https://HOST/PATH/FILE")
    return name


def _is_there(file: Wanted, folder: Path, record: dict[str, Fetched], force: bool) -> bool:
    """Whether the file is complete; UserError if another is in its place and `force` does not allow to replace it."""
    path = folder / file.name
    if not path.exists():
        return False
    known, state = record.get(file.name), path.stat()
    untouched = known is not None and (known.size, known.modified_ns) == (state.st_size, state.st_mtime_ns)
    if known and untouched and (known.sha256 == file.digest.value if file.digest else known.url == file.url):
        return True
    if file.digest is not None and (sha256 := checked(path, file.digest)):
        record[file.name] = _complete(file, path, sha256)
        return True
    if not force:
        raise UserError(
            f"{path} exists, and is not the file of {file.url}; add --force to replace it, or choose another --output"
        )
    return False


def _check_space(missing: Sequence[Wanted], folder: Path) -> None:
    parts = [folder / f"{file.name}.part" for file in missing if file.size]
    needed = sum(file.size or 0 for file in missing) - sum(part.stat().st_size for part in parts if part.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--output {folder} needs {needed / 1e9:,.2f} GB and has {free / 1e9:,.2f} GB free; choose another "
            "--output, or fewer files with --shards or --files"
        )


def _bring(file: Wanted, path: Path, told: Told) -> Fetched:
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.cached is not None and (sha256 := checked(file.cached, file.digest)):
        _link(file.cached.resolve(), path)
        told(path.stat().st_size, file.size)
        return _complete(file, path, sha256)
    return _complete(file, path, download(file, path, told))


def _link(cached: Path, path: Path) -> None:
    """A second name for a file of the cache, or a copy where that is on another disk."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(cached, part)
    except OSError:
        shutil.copyfile(cached, part)
    part.replace(path)
    path.with_name(f"{path.name}.part.json").unlink(missing_ok=True)


def _complete(file: Wanted, path: Path, sha256: str) -> Fetched:
    state = path.stat()
    return Fetched(file.url, state.st_size, sha256, state.st_mtime_ns)


def _read_record(folder: Path) -> dict[str, Fetched]:
    try:
        content = json.loads((folder / RECORD).read_bytes())
        return {name: Fetched(**value) for name, value in content.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{folder / RECORD} is damaged; remove it, what is there is then checked by its hash") from None


def _write_record(folder: Path, record: dict[str, Fetched]) -> None:
    content = {name: asdict(record[name]) for name in sorted(record)}
    put(folder / RECORD, (json.dumps(content, indent=1) + "\n").encode())
