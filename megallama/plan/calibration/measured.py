"""What a run recorded of itself: where it ran, and the seconds of its steady steps. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.run_dir.events import METRICS, Event, read_events, standing

SETTLING = 3
"""First steps of a start, in which kernels are compiled and memory is taken."""
LEAST_EVENTS = 5
"""Fewer say nothing of what is usual."""


@dataclass(frozen=True)
class MeasuredRun:
    """The last start of a run."""

    config: RunConfig
    world_size: int
    device: str
    """By its driver's name, or cpu."""
    threads: int
    """The threads of each rank, on a CPU."""
    seconds: tuple[float, ...]
    """Per step, of each `train` event in which nothing but training went on."""

    @property
    def step_seconds(self) -> float:
        """The median."""
        return median(self.seconds)


def read_run(folder: Path) -> MeasuredRun:
    """The run in `folder`; UserError if there is none, or if its last start had too few steps."""
    for name in ("config.yaml", "environment.json", METRICS):
        if not (folder / name).is_file():
            raise UserError(f"--calibrate={folder} is no run, for it has no {name}; give the run.dir of one")
    config = load_config(folder / "config.yaml")
    environment = _environment(folder / "environment.json")
    seconds = steady_seconds(_events(folder / METRICS), config.logging.every)
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
    settled = (events[starts[-1]]["step"] if starts else 0) + SETTLING
    # Of this start alone, also where it was undone: what stands of others ran somewhere else.
    last = standing(events[starts[-1] :] if starts else events)
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
        found: Event = json.loads(path.read_bytes())
        topology, device, threads = found["topology"], found["device"], found["threads"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise _unreadable(path, str(error)) from None
    sizes = list(topology.values()) if isinstance(topology, dict) else []
    if not sizes or not all(_is_count(size) for size in sizes):
        raise _unreadable(path, f"topology is {topology}")
    if not isinstance(device, str) or not _is_count(threads):
        raise _unreadable(path, f"device is {device}, threads is {threads}")
    return {"topology": topology, "device": device, "threads": threads}


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not what a run of this version writes ({why}); train again")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _events(path: Path) -> list[Event]:
    """UserError for what no run writes, which could otherwise pass for a measurement."""
    events = read_events(path)
    for number, event in enumerate(events, 1):
        seconds: Any = event.get("seconds")
        if event["event"] == "train" and (type(seconds) not in (int, float) or not 0 < seconds < math.inf):
            raise UserError(
                f"{path}, line {number}, is a train event whose seconds are {seconds}, not a number above 0; "
                "take the line out, or train again"
            )
    return events
