"""The look at a node: real processes as nodes of this machine, one of which may be broken."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import megallama.cluster.preflight as preflight
from megallama.cluster.preflight import first_of_pair, tried
from megallama.cluster.verdict import Report, bad_nodes, read_reports
from megallama.config.load import load_config
from megallama.errors import UserError
from tests.launching import CONFIG, ROOT, clean_environment
from tests.test_launchers import free_port

NODES = ("n1", "n2", "n3")
SLOW = 1e6
"""Bytes/s that every link of this machine has, whatever else it does."""


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9])
def test_pairs_are_a_ring(size: int) -> None:
    pairs = set()
    for number in range(3):
        firsts = [first_of_pair(rank, size)[number] for rank in range(size)]
        for first in {first for first in firsts if first is not None}:
            pair = {first, (first + 1) % size}
            assert {rank for rank in range(size) if firsts[rank] == first} == pair
            pairs.add(frozenset(pair))
    assert len(pairs) == {1: 0, 2: 1}.get(size, size)


def test_what_hangs_or_dies_in_a_trial_is_told() -> None:
    with pytest.raises(RuntimeError, match="exit: the process that tried it ended"):
        tried(os._exit, 3)
    with pytest.raises(UserError, match="a mistake"):
        tried(_mistake)
    assert tried(max, 2, 3) == 3


def test_a_trial_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "TRIAL_SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="sleep: no answer in 1 s"):
        tried(time.sleep, 60)
    assert time.monotonic() - began < 20


def test_three_good_nodes_find_nothing(tmp_path: Path) -> None:
    reports = looked(tmp_path, NODES)
    assert bad_nodes(evened(reports), NODES) == {}
    assert [{link.other for link in report.links} for report in reports] == [{"n2", "n3"}, {"n1", "n3"}, {"n1", "n2"}]
    assert all(link.bytes_per_second > SLOW for report in reports for link in report.links)
    assert all(abs(report.clock_seconds or 0) < 5 for report in reports)


def test_a_node_with_an_error_is_left_out_by_its_neighbours(tmp_path: Path) -> None:
    reports = looked(tmp_path, NODES, blind="n2")
    assert list(bad_nodes(evened(reports), NODES)) == ["n2"]
    assert [len(report.links) for report in reports] == [1, 0, 1]


def test_gpus_that_cuda_does_not_find_are_an_error() -> None:
    auto = load_config(CONFIG, ["train.device=auto"])
    with pytest.raises(UserError, match="Slurm gave it 8 GPUs, and CUDA finds none"):
        preflight._devices(auto, 1, 8)
    assert preflight._devices(load_config(CONFIG, ["train.device=cpu"]), 1, 8) == []


def looked(folder: Path, nodes: tuple[str, ...], blind: str = "") -> list[Report]:
    """What nodes report that look at themselves at once; one may be without the file that all must see."""
    (folder / "token").touch()
    port, started = str(free_port()), []
    for rank, node in enumerate(nodes):
        token = folder / ("nothing" if node == blind else "token")
        words = ["--address=127.0.0.1", "--port", port, "--ranks-per-node=1", "--token", str(token)]
        run = [CONFIG, f"run.dir={folder / 'run'}", "train.device=cpu"]
        command = [sys.executable, "-m", "megallama.cluster.preflight", *words, "--nodes", ",".join(nodes), *run]
        environment = clean_environment(folder, SLURMD_NODENAME=node, SLURM_NODEID=str(rank))
        with (folder / node).open("w") as out:
            started.append(subprocess.Popen(command, env=environment, stdout=out, cwd=ROOT))
    assert [process.wait(120) for process in started] == [0] * len(nodes)
    return [report for node in nodes for report in read_reports(folder / node)]


def evened(reports: list[Report]) -> list[Report]:
    """With no link faster than `SLOW`: how the others compare tells what else this machine did meanwhile."""
    slowed = [
        [replace(link, bytes_per_second=min(SLOW, link.bytes_per_second)) for link in report.links]
        for report in reports
    ]
    return [replace(report, links=links) for report, links in zip(reports, slowed, strict=True)]


def _mistake() -> None:
    raise UserError("a mistake")
