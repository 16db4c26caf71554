"""`megallama checkpoint ...`: what a run has saved, and going back to it. Reads with numpy: none waits for torch."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megallama.checkpoint.format import Manifest
    from megallama.checkpoint.tensors import Stored

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="PATH", help="Checkpoint, such as .../checkpoints/step_00001000.")]

checkpoint_app = typer.Typer(help="Inspect the checkpoints of a run, or go back to one.", no_args_is_help=True)


@checkpoint_app.command("list")
def list_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or its checkpoints folder.")],
    as_json: AsJson = False,
) -> None:
    """List all checkpoints of a run, newest first, including incomplete ones. Does not read their tensors.

    Example: megallama checkpoint list runs/quickstart
    """
    from rich.console import Console

    from megallama.checkpoint.commands.listing import checkpoints_folder, entries, pointers
    from megallama.checkpoint.commands.report import json_of, print_entries

    folder = checkpoints_folder(run)
    found, marked = entries(folder), pointers(folder)
    if as_json:
        typer.echo(json_of({"folder": folder, **marked, "checkpoints": [asdict(entry) for entry in found]}))
        return
    # A pipe has no width; the table has.
    print_entries(found, Console(width=None if sys.stdout.isatty() else 140))
    for pointer, name in marked.items():
        if name not in {entry.path.name for entry in found}:
            typer.echo(f"{pointer} names {name!r}, which is not there")


@checkpoint_app.command("verify")
def verify_command(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Checkpoints, or run directories to verify all of theirs.")
    ],
    as_json: AsJson = False,
) -> None:
    """Verify every byte of checkpoints: hashes, that all tensors of the model are there, and finite numbers.

    Exit code 2 if one is damaged. Example: megallama checkpoint verify runs/quickstart
    """
    from megallama.checkpoint.commands.listing import checkpoints_at
    from megallama.checkpoint.commands.progress import shown
    from megallama.checkpoint.commands.report import json_of
    from megallama.checkpoint.reading.inspect import inspect

    verdicts: dict[str, list[str]] = {}
    for checkpoint in [found for path in paths for found in checkpoints_at(path)]:
        with shown() as report:
            verdicts[str(checkpoint)] = reasons = inspect(checkpoint, report)
        if not as_json:
            typer.echo(f"{checkpoint}: damaged: {'; '.join(reasons)}" if reasons else f"{checkpoint}: sound")
    passed = not any(verdicts.values())
    if as_json:
        checkpoints = [{"path": path, "sound": not reasons, "reasons": reasons} for path, reasons in verdicts.items()]
        typer.echo(json_of({"passed": passed, "checkpoints": checkpoints}))
    raise typer.Exit(0 if passed else 2)


@checkpoint_app.command("show")
def show_command(path: Checkpoint, as_json: AsJson = False) -> None:
    """Show the content of a checkpoint: position of the run, layout, model, files and tensors.

    Example: megallama checkpoint show runs/quickstart/checkpoints/step_00000700
    """
    from megallama.checkpoint.commands.report import json_of, print_sections
    from megallama.checkpoint.format import FORMAT

    manifest, document, stored = _open(path)
    facts = {"path": path, "format": FORMAT, "saved": manifest.saved, **document}
    facts |= {"versions": manifest.versions, "files": asdict(manifest)["files"], "tensors": stored.shapes}
    if as_json:
        typer.echo(json_of(facts))
    else:
        print_sections(facts)


@checkpoint_app.command("diff")
def diff_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints: state, data, model, layout, and the values of each tensor.

    `largest` is the largest |A - B| of a tensor, `relative` is |A - B| / |A|. Exit code 1 if anything differs.

    Example: megallama checkpoint diff runs/a/checkpoints/step_00001000 runs/b/checkpoints/step_00001000
    """
    from megallama.checkpoint.commands.difference import differing_fields, tensor_differences
    from megallama.checkpoint.commands.progress import shown
    from megallama.checkpoint.commands.report import json_of, print_difference

    (_, document_a, stored_a), (_, document_b, stored_b) = _open(a), _open(b)
    fields = differing_fields(document_a, document_b)
    with shown() as report:
        tensors = list(tensor_differences(stored_a, stored_b, report))
    equal = not fields and all(tensor.equal for tensor in tensors)
    if as_json:
        compared = {"fields": [asdict(field) for field in fields], "tensors": [asdict(tensor) for tensor in tensors]}
        typer.echo(json_of({"equal": equal, **compared}))
    else:
        print_difference(fields, tensors)
    raise typer.Exit(0 if equal else 1)


@checkpoint_app.command("rollback")
def rollback_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, such as runs/quickstart.")],
    step: Annotated[str, typer.Argument(metavar="STEP", help="Step, name or path of a checkpoint of the run.")],
    as_json: AsJson = False,
) -> None:
    """Go back to a checkpoint. Newer ones are renamed, not deleted; the next start continues from it.

    The run must not be active. Example: megallama checkpoint rollback runs/quickstart 700
    """
    from megallama.checkpoint.commands.report import json_of
    from megallama.checkpoint.reading.rollback import roll_back

    done = roll_back(run, step)
    if as_json:
        typer.echo(json_of(done.facts))
        return
    for name, aside in done.set_aside.items():
        typer.echo(f"{name} set aside as {aside}")
    typer.echo(f"the next start continues {done.path}")


def _open(path: Path) -> tuple[Manifest, dict[str, Any], Stored]:
    """What the checkpoint at `path` says of itself, and its tensors. UserError if it is none, or not a whole one."""
    from megallama.checkpoint.commands.listing import is_one
    from megallama.checkpoint.format import TornCheckpointError, named_checkpoints, read_document, read_manifest
    from megallama.checkpoint.reading.inspect import promised
    from megallama.errors import UserError

    if not is_one(path):
        near = [*named_checkpoints(path / "checkpoints"), *named_checkpoints(path)]
        fix = near[0] if near else "a folder such as runs/quickstart/checkpoints/step_00000700"
        raise UserError(f"{path} is not a checkpoint; give {fix}")
    try:
        return read_manifest(path), read_document(path), promised(path)
    except TornCheckpointError as error:
        raise UserError(f"{path} is not a whole checkpoint ({error}); give another") from None
