"""Say in one line what run directories show: that they trained, what they took, or that a resumed one agrees.

Exit code 1 where they did not. Example: python benchmarks/gpu_runs.py forecast runs/1b
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from megallama.run_dir.steady import SETTLING

TOLERANCE = 1e-3
"""Relative difference of losses after a resume: on a GPU gradients differ in their last bits from run to run."""
COMPARED = (
    ("seconds", "predicted_seconds", 1e-3, "ms"),
    ("peak_memory_bytes", "predicted_memory_bytes", 2**30, "GiB"),
    ("peak_reserved_bytes", "predicted_device_bytes", 2**30, "GiB with overhead"),
)
"""Of the event `forecast`: measured, predicted, and the unit in which both are said."""
Event = dict[str, Any]


def events(run: Path, kind: str) -> list[Event]:
    """Those of one kind, of every start of the run."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [event for event in found if event["event"] == kind]


def trained(run: Path) -> tuple[str, bool]:
    """Losses and saves; whether the run is done, finite and saved."""
    steps, saves = events(run, "train"), events(run, "checkpoint")
    status = json.loads((run / "outcome.json").read_text())["status"]
    good = status == "done" and bool(saves) and all(math.isfinite(step["loss"]) for step in steps)
    losses = f"loss {steps[0]['loss']:.5f} to {steps[-1]['loss']:.5f}"
    return f"{run.name} {status}, {losses}, norm {steps[-1]['grad_norm']:.4g}, saves {len(saves)}", good


def forecast(run: Path) -> tuple[str, bool]:
    """Speed, saves, and measured beside predicted."""
    steps = events(run, "train")[SETTLING:]
    speed = f"{1e3 * median(step['seconds'] for step in steps):.1f} ms/step"
    found = [speed, f"MFU {median(step['mfu'] for step in steps):.1%}"]
    for save in events(run, "checkpoint"):
        size, waits = save["bytes"] / 2**30, save["blocked_seconds"]
        found.append(f"save of {size:.2g} GiB in {save['seconds']:.2f} s of which training waits {waits:.2f}")
    return ", ".join([*found, compared(run)]), True


def compared(run: Path) -> str:
    """Each measured figure of the last event `forecast` beside the predicted one."""
    *_, event = [{}, *events(run, "forecast")]
    found = [
        f"{event[real] / unit:.4g} {name}, predicted {event[said] / unit:.4g} ({event[said] / event[real] - 1:+.1%})"
        for real, said, unit, name in COMPARED
        if real in event and said in event
    ]
    return f"forecast: {', '.join(found) or 'none, there is no constant for this device'}"


def resumed(run: Path) -> tuple[str, bool]:
    """The largest difference of the losses of steps that the run took twice, whether it is small, and the forecast."""
    first: dict[int, float] = {}
    again: dict[int, float] = {}
    for event in events(run, "train"):
        step, loss = event["step"], event["loss"]
        if step in first:
            again[step] = abs(loss / first[step] - 1)
        first.setdefault(step, loss)
    if not again:
        return "no step was taken twice", False
    worst, same = max(again.values()), sum(difference == 0 for difference in again.values())
    words = f"of {len(again)} steps taken again {same} have the same loss, others differ by {worst:.1e} at most"
    return f"{words}, {compared(run)}", worst <= TOLERANCE


PARTS = {"trained": trained, "forecast": forecast, "resumed": resumed}


def main() -> int:
    """Print a line for each run; the exit code says whether all are good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    options = parser.parse_args()
    found = [PARTS[options.part](run) for run in options.runs]
    print("\n".join(line for line, _ in found))
    return int(not all(good for _, good in found))


if __name__ == "__main__":
    raise SystemExit(main())
