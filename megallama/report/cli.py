"""`megallama report`: what runs say of themselves, for a browser and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from megallama.errors import UserError, check_printable, printable
from megallama.system.whole_file import temporary

BUCKETS = 1000
"""Parts of a curve of one run, about as many as a plot has pixels across."""
ALL_BUCKETS = 1600
"""Of runs that are drawn together, with which a page keeps below two megabytes."""

_HEAD_BYTES = 2000
"""Of a page, in which it says who made it."""


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN ...]", help="Run directories, drawn together.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html and report.png, or an .html file. Default: the first RUN."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are no report.")] = False,
) -> None:
    """Draw the losses, speed, memory and history of runs into one HTML file, which opens anywhere, and one PNG.

    Example: megallama report runs/quickstart
    """
    # matplotlib takes half a second to import, which other commands need not wait for.
    from megallama.report.differences import differences
    from megallama.report.page import draw_page
    from megallama.report.picture import draw_picture
    from megallama.report.record import read_record

    buckets = max(100, min(BUCKETS, ALL_BUCKETS // len(runs)))
    records = [read_record(run, name, buckets) for run, name in zip(runs, names_of(runs), strict=True)]
    page, picture = _targets(runs[0] if output is None else output, force=force)
    differing = differences(runs)
    if differing:
        typer.echo(f"megallama: the configs of these runs differ in {_listed(differing)}", err=True)
    _write({page: draw_page(records, differing), picture: draw_picture(records)})
    typer.echo(f"the report is in {page}, a picture of it in {picture}")


def names_of(runs: Sequence[Path]) -> list[str]:
    """What to call each run: the last part of its path, or as much of the path as tells it from the others."""
    paths = [Path(os.path.abspath(run)).parts for run in runs]
    for many in range(1, max(map(len, paths)) + 1):
        names = [printable("/".join(parts[-many:])) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{' '.join(map(str, runs))} has a run twice; name each once")


def _targets(output: Path, *, force: bool) -> tuple[Path, Path]:
    """The page and the picture; UserError where they cannot be."""
    if output.is_dir():
        page = output / "report.html"
    elif output.suffix.lower() == ".html":
        page = output
    else:
        raise UserError(f"--output={output} is neither a folder that exists nor an .html file; make it, or name a file")
    targets = page, page.with_suffix(".png")
    force = force or _is_report(page)
    for path in targets:
        check_printable("--output", str(path))
        if os.path.lexists(path) and not force:
            raise UserError(f"{path} exists; write over it with --force, or give another --output")
    return targets


def _is_report(page: Path) -> bool:
    """Whether this command has made the file, and with it the picture beside it: a newer one takes their place."""
    try:
        with page.open("rb") as file:
            return b'<meta name="generator" content="megallama report">' in file.read(_HEAD_BYTES)
    except OSError:
        return False


def _write(contents: dict[Path, bytes]) -> None:
    """Write all files, each whole; none where there is no room for all."""
    written = {path: temporary(path) for path in contents}
    try:
        for path, content in contents.items():
            written[path].write_bytes(content)
        for path, partial in written.items():
            partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{next(iter(contents))} cannot be written ({error.strerror or error}); "
            "give --output a folder with room that you may write to"
        ) from None
    finally:
        for partial in written.values():
            partial.unlink(missing_ok=True)


def _listed(differing: dict[str, list[str]]) -> str:
    keys = list(differing)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} other keys" if len(keys) > 3 else "")
