"""Checkpoints of a run as a part of a plan: their size, what they cost, how often to make one. Pure."""

from __future__ import annotations

from megallama.layout.counts import ParameterCount
from megallama.plan.report.cadence import BYTES_PER_PARAMETER, GPU_HOURS_BETWEEN_FAILURES, RESTART_SECONDS, cadence
from megallama.plan.report.table import Part, Row


def cadence_part(count: ParameterCount, world_size: int, step_seconds: float | None) -> Part:
    """Of a model on that many GPUs; with the seconds of a step, the interval in steps as `checkpoint.every` counts."""
    found = cadence(count.total, world_size)
    failure, interval = found.failure_seconds, found.interval_seconds
    rows = [
        Row("size", "one checkpoint", f"{BYTES_PER_PARAMETER} B * {count.total}", found.size, "GiB"),
        Row("stop", "training waits for it", f"its copy to the host, 1/{world_size} per rank", found.stop_seconds, "s"),
        Row(
            "failure",
            "between failures",
            f"{GPU_HOURS_BETWEEN_FAILURES} GPU hours / {world_size}, arXiv 2407.21783, table 5",
            failure / 3600,
            "h",
        ),
        Row("interval", "save every", "Daly 2006, of the two above", interval / 60, "min"),
    ]
    if step_seconds is not None:
        how = f"checkpoint.every: {interval:.4g} s / {step_seconds:.4g} s"
        rows.append(Row("every", "in steps", how, max(1, round(interval / step_seconds))))
    how = f"saves, work done again, {RESTART_SECONDS:.0f} s for each restart"
    rows.append(Row("lost", "time lost to saves and failures", how, 100 * found.lost, "%"))
    return Part("checkpoints", "Checkpoints", tuple(rows))
