"""torchrun and deepspeed over two network namespaces, each with its own address, as two machines without Slurm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.runs import assert_same_run
from tests.launching import BIN, PRETRAIN, ROOT, clean_environment, kill_all
from tests.slurm.runs import small

pytestmark = pytest.mark.slurm

ADDRESSES = ("10.77.0.1", "10.77.0.2")


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    """Two, joined by a cable."""
    if os.getuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"megallama{os.getpid()}{letter}" for letter in "ab"]
    ends = [f"ml{os.getpid()}{letter}"[:15] for letter in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def test_torchrun_over_two_networks(
    namespaces: list[str], byte_dataset: str, straight_tp2: Path, tmp_path: Path
) -> None:
    where = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={ADDRESSES[0]}", "--master-port=29500"]
    _train(namespaces, tmp_path, byte_dataset, lambda rank: [str(BIN / "torchrun"), *where, f"--node-rank={rank}"])
    assert_same_run(tmp_path / "run", straight_tp2)


def test_deepspeed_over_two_networks(
    namespaces: list[str], byte_dataset: str, straight_tp2: Path, tmp_path: Path
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    where = [f"--hostfile={hostfile}", "--no_ssh", f"--master_addr={ADDRESSES[0]}", "--master_port=29500"]
    _train(namespaces, tmp_path, byte_dataset, lambda rank: [str(BIN / "deepspeed"), *where, f"--node_rank={rank}"])
    assert_same_run(tmp_path / "run", straight_tp2)


def _train(namespaces: list[str], home: Path, dataset: str, launcher: Callable[[int], list[str]]) -> None:
    """The same command on both nodes but for the rank."""
    words = [PRETRAIN, "--config", "configs/7b.yaml", *small(dataset, home / "run")]
    processes, logs = [], []
    for rank, name in enumerate(namespaces):
        logs.append(home / f"node{rank}.log")
        with logs[-1].open("w") as log:
            command = ["ip", "netns", "exec", name, *launcher(rank), *words]
            environment = clean_environment(home, OMP_NUM_THREADS="1")
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(180) for process in processes]
    finally:
        kill_all(home)
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
