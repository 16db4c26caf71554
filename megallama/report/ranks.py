"""The ranks of a run that others wait for, in words."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from megallama.errors import printable
from megallama.report.axes import number
from megallama.report.marks import rank_words
from megallama.run_dir.events import Event

MOST_RANKS = 8


def slow_ranks(stand: Sequence[Event]) -> dict[str, str]:
    """The ranks that were most often the slowest or stragglers, at most eight, by their names; none of one rank alone.

    From the events that stand: `slowest` of `train`, pairs of a rank and the seconds of its own work, and `straggler`.
    """
    slowest, behind, hosts = dict[int, list[float]](), dict[int, list[float]](), dict[int, str]()
    told = [_slowest(event) for event in stand if event["event"] == "train"]
    for rank, seconds in (pair for pair in told if pair is not None):
        slowest.setdefault(rank, []).append(seconds)
    for event in stand:
        late = number(event, "seconds")
        if event["event"] == "straggler" and event.get("rank") is not None and late is not None:
            behind.setdefault(event["rank"], []).append(late)
            hosts[event["rank"]] = rank_words(event)
    measured = sum(map(len, slowest.values()))
    ranks = sorted(
        {*slowest, *behind}, key=lambda rank: (-len(behind.get(rank, ())), -len(slowest.get(rank, ())), rank)
    )
    found = dict[str, str]()
    for rank in ranks[:MOST_RANKS]:
        said = []
        if times := slowest.get(rank):
            said.append(f"worked longest in {len(times)} of {measured} events, {median(times):.3g} s of work in a step")
        if late_by := behind.get(rank):
            said.append(f"a straggler in {len(late_by)}, {median(late_by):.3g} s behind")
        found[printable(hosts.get(rank, f"rank {rank}"))] = "; ".join(said)
    return found


def _slowest(event: Event) -> tuple[int, float] | None:
    """The rank that worked longest in a step and its seconds; None where the event compares no ranks."""
    pairs = event.get("slowest")
    if not isinstance(pairs, list) or len(pairs) < 2:
        return None
    found = list[tuple[float, int]]()
    for pair in pairs:
        match pair:
            case [int(rank), seconds] if (took := number({"seconds": seconds}, "seconds")) is not None:
                found.append((took, rank))
    return (max(found)[1], max(found)[0]) if found else None
