"""Files that a plan writes: each is new, and where it cannot be is known before anything is computed."""

from __future__ import annotations

from pathlib import Path

from megallama.errors import UserError


def check_new_file(option: str, path: Path, example: str) -> None:
    """UserError unless a file of that name can be made here and none is there yet; `example` is a legal name."""
    try:
        if path.is_dir():
            raise UserError(f"{option}={path} is a folder; give the name of a file, as {example}")
        # Made and removed: permissions, full disks and lengths of names are all asked this way.
        path.touch(exist_ok=False)
    except FileExistsError:
        raise _there(path) from None
    except OSError as error:
        raise _cannot(path, error) from None
    path.unlink()


def write_new_files(contents: dict[Path, bytes]) -> None:
    """Write all of them or none; UserError where one exists or cannot be written."""
    made: list[Path] = []
    try:
        for path, content in contents.items():
            with path.open("xb") as file:
                made.append(path)
                file.write(content)
    except FileExistsError:
        for each in made:
            each.unlink()
        raise _there(path) from None
    except OSError as error:
        for each in made:
            each.unlink()
        raise _cannot(path, error) from None


def _there(path: Path) -> UserError:
    return UserError(f"{path} exists, and is not written over; give another name, or remove it")


def _cannot(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written ({error.strerror}); give a path in a folder that is there")
