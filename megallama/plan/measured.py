"""What a run recorded of itself: where it ran, and the seconds of its steady steps. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError

SETTLING = 3
"""First steps of a start, in which kernels are compiled and memory is taken."""
LEAST_EVENTS = 5
"""Fewer say nothing of what is usual."""

Event = dict[str, Any]


@dataclass(frozen=True)
class MeasuredRun:
    """The last start of a run."""

    config: RunConfig
    world_size: int
    device: str
    """By its driver's name, or cpu."""
    threads: int
    """Of each rank, on a CPU."""
    seconds: tuple[float, ...]
    """Per step, of each `train` event in which nothing but training went on."""

    @property
    def step_seconds(self) -> float:
        """The median."""
        return median(self.seconds)


def read_run(folder: Path) -> MeasuredRun:
    """The run in `folder`; UserError if there is none, or if its last start had too few steps."""
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"--calibrate={folder} is no run, for it has no {name}; give the run.dir of one")
    config = load_config(folder / "config.yaml")
    environment = _environment(folder / "environment.json")
    seconds = steady_seconds(_events(folder / "metrics.jsonl"), config.logging.every)
    if len(seconds) < LEAST_EVENTS:
        raise UserError(
            f"--calibrate={folder} has {len(seconds)} train events of steady steps, and {LEAST_EVENTS} are needed; "
            f"train {SETTLING + (LEAST_EVENTS + 1) * config.logging.every} steps, without a save between"
        )
    return MeasuredRun(
        config=config,
        world_size=prod(environment["topology"].values()),
        device=environment["device"],
        threads=environment["threads"],
        seconds=tuple(seconds),
    )


def steady_seconds(events: list[Event], every: int) -> list[float]:
    """Seconds per step of the last start's `train` events, each the mean of the `every` steps up to its own.

    Left out are those with a step in which the run settled, or during which a save was being written. Evaluations are
    not in these seconds.
    """
    starts = [index for index, event in enumerate(events) if event["event"] == "resume"]
    last = events[starts[-1] :] if starts else events
    settled = (last[0]["step"] if starts else 0) + SETTLING
    found: dict[int, float] = {}
    saving = False
    for event in last:
        if event["event"] == "train":
            if event["step"] - every >= settled and not saving:
                found[event["step"]] = event["seconds"]
            saving = False
        elif event["event"] in ("checkpoint", "checkpoint_failed"):
            found = {step: seconds for step, seconds in found.items() if step <= event["step"]}
            # The step before which it ended is not recorded yet.
            saving = True
    return list(found.values())


def _environment(path: Path) -> Event:
    try:
        found: Event = json.loads(path.read_text())
        return {"topology": found["topology"], "device": found["device"], "threads": found["threads"]}
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not what a run of this version writes ({error}); train again") from None


def _events(path: Path) -> list[Event]:
    """Whole lines only: a run that was killed may have left the last one torn."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
