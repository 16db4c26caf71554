"""Which nodes may not train, from reports that real nodes of a large cluster might have made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megallama.cluster.verdict import Link, Report, bad_nodes, read_reports, refuse_apart
from megallama.errors import UserError

NODES = ("n1", "n2", "n3", "n4")
VERSIONS = {"python": "3.12.1", "torch": "2.11.0"}
GOOD = [
    Report(
        node,
        versions=VERSIONS,
        clock_seconds=0.01,
        device_flops=[6e14] * 8,
        links=[Link(NODES[number - 1], 4e10), Link(NODES[(number + 1) % 4], 4.1e10)],
    )
    for number, node in enumerate(NODES)
]


def links(before: float, after: float) -> list[Link]:
    """Of n3."""
    return [Link("n2", before), Link("n4", after)]


def changed(number: int, **fields: object) -> list[Report]:
    """Good reports but for what one of them says."""
    return [replace(report, **fields) if n == number else report for n, report in enumerate(GOOD)]


def test_good_nodes_are_good() -> None:
    assert bad_nodes(GOOD, NODES) == {}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"errors": ["device 3 does not work: CUDA error"]}, "device 3 does not work: CUDA error"),
        (
            {"versions": {"python": "3.12.1", "torch": "2.10.0"}},
            "it has torch 2.10.0, and most have torch 2.11.0",
        ),
        ({"versions": {"python": "3.12.1"}}, "it has torch missing, and most have torch 2.11.0"),
        ({"clock_seconds": -3600.0}, "its clock is -3600 s off"),
        ({"device_flops": [6e14] * 7 + [3e14]}, "device 7 computes at 50% of the median"),
        ({"links": links(1e9, 1.1e9)}, "it is reached at 1.10 GB/s, where 41.00 is the median"),
        ({"links": links(0.0, 0.0)}, "no neighbour reaches it"),
    ],
)
def test_a_bad_node_is_named_with_its_reason(fields: dict[str, object], reason: str) -> None:
    assert bad_nodes(changed(2, **fields), NODES) == {"n3": [reason]}


@pytest.mark.parametrize(
    "fields",
    [
        {"clock_seconds": 3.0},
        {"device_flops": [5e14] * 8},
        {"links": links(0.0, 3e10)},  # the neighbour's fault
        {"links": links(2e10, 2e10)},
        {"clock_seconds": None, "links": []},
    ],
)
def test_what_may_be_is_not_held_against_a_node(fields: dict[str, object]) -> None:
    assert bad_nodes(changed(2, **fields), NODES) == {}


def test_a_node_that_does_not_answer_is_bad() -> None:
    assert bad_nodes(GOOD[:1] + GOOD[2:], NODES) == {"n2": ["it did not answer"]}


def test_the_first_node_may_be_the_bad_one() -> None:
    other = VERSIONS | {"torch": "2.10.0"}
    assert list(bad_nodes(changed(0, versions=other), NODES)) == ["n1"]
    late = [replace(report, clock_seconds=0.0 if n == 0 else 3600.0) for n, report in enumerate(GOOD)]
    assert bad_nodes(late, NODES) == {"n1": ["its clock is -3600 s off"]}
    alone = [replace(report, errors=["it cannot reach 10.0.0.1:9"], links=[]) for report in GOOD]
    broken = replace(GOOD[0], errors=["device 0 does not work"])
    assert bad_nodes([broken, *alone[1:]], NODES) == {"n1": ["device 0 does not work"]}
    assert bad_nodes(alone[1:], NODES) == {"n1": ["it did not answer"]}
    assert list(bad_nodes([GOOD[0], alone[1], *GOOD[2:]], NODES)) == ["n2"]


def test_of_two_nodes_that_differ_it_is_the_second() -> None:
    two = [GOOD[0], replace(GOOD[1], versions=VERSIONS | {"torch": "2.10.0"}, clock_seconds=60.0)]
    assert list(bad_nodes(two, NODES[:2])) == ["n2"]


def test_who_is_next_to_a_bad_node_is_not_bad() -> None:
    """Its only other link may be slow, and with the bad one it has none."""
    next_to = [
        replace(GOOD[1], links=[Link("n1", 4e10), Link("n3", 0.0)]),
        replace(GOOD[2], errors=["device 3 does not work"], links=[]),
        replace(GOOD[3], links=[Link("n3", 0.0)]),
    ]
    assert list(bad_nodes([GOOD[0], *next_to], NODES)) == ["n3"]


def test_reports_are_found_among_what_libraries_print(tmp_path: Path) -> None:
    lines = [report.line() for report in GOOD]
    noise = ["0: a warning {", "2: 5", "[1, 2]", '1: {"node": "n9", "links": [], "more": 1}', f" 1: {lines[1][:90]}"]
    labelled = [f"{number:2}: {line}" for number, line in enumerate(lines) if number != 1]
    (tmp_path / "a").write_text("\n".join([*noise, *labelled]))
    found = read_reports(tmp_path / "a")
    assert [report.line() for report in found] == [lines[0], *lines[2:]]


def test_a_run_directory_that_only_the_first_node_sees_is_nobodys_fault() -> None:
    blind = [GOOD[0], *(replace(report, sees_run_dir=False) for report in GOOD[1:])]
    with pytest.raises(UserError, match=r"n2, n3, n4 cannot see /runs/token, which n1 wrote; put run.dir on a file"):
        refuse_apart(blind, NODES, Path("/runs/token"))
    refuse_apart([*GOOD[:3], blind[3]], NODES, Path("/runs/token"))
