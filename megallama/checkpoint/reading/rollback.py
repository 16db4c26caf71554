"""Going back to an earlier checkpoint: newer ones are set aside, none is deleted, and the run records it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megallama.checkpoint.format import folder_name, named_checkpoints, step_of, why_torn
from megallama.checkpoint.health import healthy_checkpoints, is_healthy, newer
from megallama.checkpoint.writing.commit import UNDONE, best_of, point, repoint, set_aside
from megallama.errors import UserError
from megallama.run_dir.events import METRICS, JsonLines, event_now
from megallama.system.lock import RunLock

RETURNED = "returned"
"""A file beside the checkpoints: the step to which `checkpoint.resume` last took the run back."""
_STEP = re.compile(r"(?:step_)?0*(\d{1,18})", re.ASCII)


@dataclass(frozen=True)
class Return:
    """What going back has done."""

    step: int
    path: Path
    set_aside: dict[str, str]
    """The new name of each newer checkpoint, by its old one."""

    @property
    def facts(self) -> dict[str, Any]:
        """The same as JSON takes it."""
        return asdict(self) | {"path": str(self.path)}


def roll_back(run_dir: Path, asked: str) -> Return:
    """Make the checkpoint `asked`, a step, a name or a path, the newest of a run that is not alive.

    UserError if it is not there or not one that a start would continue, or if the run is alive.
    """
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run_dir} holds no checkpoint; give a run directory such as runs/quickstart")
    _continuable(folder, asked)
    with RunLock(run_dir, handover_seconds=0.0):
        path = _continuable(folder, asked)
        try:
            returned = return_to(path)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be renamed ({error.strerror}); see who owns {folder}") from None
        # Should this process be killed here, the next start says the same by its own event.
        metrics = JsonLines(run_dir / METRICS)
        metrics.write(event_now("rollback", **returned.facts))
        metrics.close()
    return returned


def return_to(path: Path) -> Return:
    """Set aside what is newer than the checkpoint `path`, the newest first, and point at what remains."""
    undone = {other.name: set_aside(other, UNDONE).name for other in newer(path)}
    repoint(path.parent, path, best_of(healthy_checkpoints(path.parent)))
    return Return(step_of(path), path, undone)


def pass_over(path: Path) -> Iterator[str]:
    """Set aside what was saved after the checkpoint `path` and is not healthy. Says what it did, a sentence each."""
    for other in newer(path):
        aside = set_aside(other, UNDONE).name
        yield f"passed over {other.name}, which was not healthy when it was saved; set aside as {aside}"
    if not is_healthy(path):
        yield f"{path.name}, which this start continues, was not healthy when it was saved"


def find(folder: Path, asked: int | str) -> Path:
    """The checkpoint under `folder` that is asked for by its step, its name or its path. UserError if there is none."""
    named = named_checkpoints(folder)
    step, found = asked_step(asked), {step_of(path): path for path in reversed(named)}
    elsewhere = "/" in str(asked) and Path(str(asked)).resolve().parent != folder.resolve()
    if not elsewhere:  # a folder that was renamed is found by its name, and by the step that it says
        by_name = {path.name: path for path in named}
        if (path := by_name.get(Path(str(asked)).name)) is not None:
            return path
        if step is not None and step in found:
            return found[step]
    near = sorted(sorted(found, key=lambda there: abs(there - (step or 0)))[:2])
    fix = f"the nearest of them is of step {' or '.join(map(str, near))}" if near else "it has none at all"
    if step is not None and not elsewhere and (aside := sorted(folder.glob(f"{folder_name(step)}.{UNDONE}-*"))):
        fix += f", and {aside[-1].name} was set aside: give it its name again to bring it back"
    raise UserError(f"{asked} is no checkpoint of {folder}; {fix}")


def _continuable(folder: Path, asked: str) -> Path:
    """As `find`. UserError also for one that a start would not continue."""
    path = find(folder, asked)
    others = [other for other in healthy_checkpoints(folder) if other != path]
    fix = f"the newest other healthy one is of step {step_of(others[0])}" if others else "there is no other healthy one"
    if (reason := why_torn(path)) is not None:
        raise UserError(f"{path} is not whole ({reason}); {fix}")
    if not is_healthy(path):
        raise UserError(
            f"{path} was not healthy when it was saved, so a start would pass it over; {fix}, and "
            f"checkpoint.resume={step_of(path)} continues this one all the same"
        )
    return path


def asked_step(asked: int | str) -> int | None:
    """The step that a step, a name or a path of a checkpoint says, or None if it says none."""
    match = _STEP.fullmatch(Path(str(asked)).name)
    return int(match[1]) if match else None


def last_return(folder: Path) -> int | None:
    """The step to which `checkpoint.resume` has taken the run back last."""
    with suppress(OSError, ValueError):
        return int((folder / RETURNED).read_bytes())
    return None


def record_return(path: Path) -> None:
    """Remember that `checkpoint.resume` has taken the run back to the checkpoint `path`."""
    point(path.parent / RETURNED, str(step_of(path)))
