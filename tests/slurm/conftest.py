"""One cluster for all tests, and the run that nothing happens to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megallama.config.load import load_config
from tests.launching import ROOT, pretrain
from tests.slurm.cluster import Cluster, slurm_is_here
from tests.slurm.runs import small


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert slurm_is_here(), "no Slurm to start; `make test-slurm` gets it"
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def straight(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same run at tp 2 x dp 2 without Slurm, in four processes of this machine."""
    return _straight(4, byte_dataset, tmp_path_factory)


@pytest.fixture(scope="session")
def straight_tp2(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At tp 2 alone, in two processes."""
    return _straight(2, byte_dataset, tmp_path_factory)


def _straight(world_size: int, dataset: str, factory: pytest.TempPathFactory) -> Path:
    run_dir = factory.mktemp("straight") / "run"
    config = str(ROOT / "configs" / "7b.yaml")
    assert load_config(config).parallel.tensor == 2
    assert pretrain(world_size, ["--config", config, *small(dataset, run_dir)]) == [(0, "")] * world_size
    return run_dir
