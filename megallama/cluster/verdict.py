"""Which nodes of a job may not train, from what each found out about itself and about its neighbours. Pure.

What a node can know alone it says itself (`errors`). What shows only beside others is found here: versions against
those of most nodes, clocks, devices and links against the median.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, median_low

from megallama.errors import UserError

MOST_CLOCK_SECONDS = 10.0
"""Two nodes may differ by: what times of files and logs of many nodes can bear."""
LEAST_SPEED = 0.7
"""The least share of the median device's matmul rate: one slow device makes all wait (BLOOM lost 5 % to one)."""
CANNOT_REACH = "it cannot reach"
"""What a node says that did not come to the first one."""
LEAST_BANDWIDTH = 0.33
"""The least share of the median node's: less is a link at the wrong rate, more may be neighbours' traffic."""


@dataclass(frozen=True)
class Link:
    """To a neighbour."""

    other: str
    bytes_per_second: float
    """The rate of an all-reduce; 0 where it failed."""


@dataclass(frozen=True)
class Report:
    """What one node found out."""

    node: str
    errors: Sequence[str] = ()
    """What is wrong by itself, a sentence each."""
    sees_run_dir: bool = True
    """Whether what the first node wrote there is there."""
    versions: dict[str, str] = field(default_factory=dict)
    clock_seconds: float | None = None
    """Behind (negative) or before the first node's clock; None where the two could not compare."""
    device_flops: Sequence[float] = ()
    """FLOP/s of a matmul on each device; none on a CPU."""
    links: Sequence[Link] = ()
    """To the node before and the node behind, where both could."""

    def line(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self))


def read_reports(path: Path) -> list[Report]:
    """The reports among the lines of a step's output, which srun labels with the number of the task.

    What libraries print there, and what was cut off, is passed over.
    """
    found = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError, TypeError):
                fields = json.loads(re.sub(r"^ *\d+: ", "", line))
                found.append(Report(**fields | {"links": [Link(**link) for link in fields["links"]]}))
    return found


def bad_nodes(reports: Iterable[Report], expected: Sequence[str]) -> dict[str, list[str]]:
    """The nodes of `expected` that must not take part, in that order, and why."""
    by_node = {report.node: report for report in reports}
    found = [by_node.get(node) or Report(node, ["it did not answer"]) for node in expected]
    reasons = {report.node: list(report.errors) for report in found}
    if reasons[expected[0]]:  # nobody could meet there
        reasons = {node: [told for told in errors if CANNOT_REACH not in told] for node, errors in reasons.items()}
    for look in (_versions, _clock, _slow_devices, _slow_links):
        able = [report for report in found if not reasons[report.node]]
        for node, reason in look(able).items():
            reasons[node].append(reason)
    return {node: told for node, told in reasons.items() if told}


def refuse_apart(reports: Sequence[Report], expected: Sequence[str], token: Path) -> None:
    """UserError where no node but the first sees the run directory: excluding nodes would not help."""
    blind = [report.node for report in reports if not report.sees_run_dir]
    if blind and len(blind) >= len(expected) - 1:
        raise UserError(
            f"{', '.join(blind)} cannot see {token}, which {expected[0]} wrote; "
            "put run.dir on a file system that all nodes share"
        )


def _versions(reports: Sequence[Report]) -> dict[str, str]:
    """Nodes that have other versions than most have; of two that differ, the second."""
    every = Counter(json.dumps(report.versions, sort_keys=True) for report in reports if report.versions)
    if len(every) < 2:
        return {}
    usual: dict[str, str] = json.loads(every.most_common(1)[0][0])
    told = {}
    for report in reports:
        names = [name for name in sorted(report.versions | usual) if report.versions.get(name) != usual.get(name)]
        if names and report.versions:
            mine, theirs = (_named(names, versions) for versions in (report.versions, usual))
            told[report.node] = f"it has {mine}, and most have {theirs}"
    return told


def _named(names: Sequence[str], versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions.get(name, 'missing')}" for name in names)


def _clock(reports: Sequence[Report]) -> dict[str, str]:
    clocks = {report.node: report.clock_seconds for report in reports if report.clock_seconds is not None}
    usual = median_low(clocks.values()) if len(clocks) > 2 else 0.0  # of two the first is right
    off = {node: seconds - usual for node, seconds in clocks.items()}
    return {
        node: f"its clock is {seconds:+.0f} s off" for node, seconds in off.items() if abs(seconds) > MOST_CLOCK_SECONDS
    }


def _slow_devices(reports: Sequence[Report]) -> dict[str, str]:
    every = [flops for report in reports for flops in report.device_flops]
    usual = median(every) if every else 0.0
    slow = {}
    for report in reports:
        below = [number for number, flops in enumerate(report.device_flops) if flops < LEAST_SPEED * usual]
        if below:
            speed = min(report.device_flops) / usual
            slow[report.node] = f"device {', '.join(map(str, below))} computes at {speed:.0%} of the median"
    return slow


def _slow_links(reports: Sequence[Report]) -> dict[str, str]:
    """Nodes whose best link is bad: where only one of two is, the neighbour may be to blame."""
    able = {report.node for report in reports}
    links = {r.node: [link.bytes_per_second for link in r.links if link.other in able] for r in reports}
    best = {node: max(speeds) for node, speeds in links.items() if speeds}
    usual = median(best.values()) if best else 0.0
    told = {}
    for node, speed in best.items():
        if speed == 0:
            told[node] = "no neighbour reaches it"
        elif speed < LEAST_BANDWIDTH * usual:
            told[node] = f"it is reached at {speed / 1e9:.2f} GB/s, where {usual / 1e9:.2f} is the median"
    return told
