"""Nodes that must not take part, and mistakes that no node can mend."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

from tests.faults.runs import assert_same_run
from tests.launching import ROOT
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.runs import small
from tests.slurm.test_jobs import said, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="a node with its own mounts needs root")


@contextmanager
def mounted(cluster: Cluster, nodes: tuple[str, ...], mount: str) -> Iterator[None]:
    """Nodes that see another file system than this machine does."""

    def restart(*behind: str) -> None:
        for node in nodes:
            cluster.stop_node(node)
            cluster.start_node(node, behind=behind)
        cluster.wait(lambda: cluster.idle_nodes() == set(NODES), 60)

    restart("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
    try:
        yield
    finally:
        restart()


@needs_root
def test_a_node_with_another_library_is_excluded_by_name(
    cluster: Cluster, byte_dataset: str, straight_tp2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = Path(str(distribution("numpy").locate_file(f"numpy-{version('numpy')}.dist-info")))
    other = tmp_path / "other"
    shutil.copytree(facts, other)
    metadata = other / "METADATA"
    metadata.write_text(metadata.read_text().replace(f"\nVersion: {version('numpy')}\n", "\nVersion: 1.0.0\n"))
    with mounted(cluster, ("n2",), f"mount --bind {other} {facts}"):
        job = submit(cluster, tmp_path, small(byte_dataset, tmp_path / "run"), MEGALLAMA_NPROC_PER_NODE="1")
        ended = cluster.ended(job)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said(tmp_path)
        assert (ended["ExcNodeList"], ended["NodeList"]) == ("n2", "n[1,3]")
    assert f"n2 cannot take part: it has numpy 1.0.0, and most have numpy {version('numpy')}" in said(tmp_path)
    assert_same_run(tmp_path / "run", straight_tp2)
    with capsys.disabled():
        print(f"\n{cluster.controller_log(job)}")


@needs_root
def test_a_run_directory_that_nodes_do_not_share_is_refused(
    cluster: Cluster, byte_dataset: str, tmp_path: Path
) -> None:
    (tmp_path / "local").mkdir()
    with mounted(cluster, ("n2",), f"mount -t tmpfs none {tmp_path / 'local'}"):
        job = submit(cluster, tmp_path, small(byte_dataset, tmp_path / "local" / "run"))
        ended = cluster.ended(job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0"), said(tmp_path)
    assert f"megallama: n2 cannot see {tmp_path}/local/run/logs/{job}-0-token, which n1 wrote; put run.dir" in said(
        tmp_path
    )


def test_a_config_that_does_not_fit_the_allocation_is_one_sentence(
    cluster: Cluster, byte_dataset: str, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, small(byte_dataset, tmp_path / "run", "parallel.pipeline=2"), nodes=3)
    assert cluster.ended(job)["ExitCode"] == "2:0"
    (sentence,) = said(tmp_path).splitlines()
    assert sentence.startswith("megallama: 3 nodes of 2 ranks: a world size of 6 is not a multiple of")
    assert not (tmp_path / "run").exists()


def test_an_array_is_refused(cluster: Cluster, byte_dataset: str, tmp_path: Path) -> None:
    options = ["--array=1-2", f"--output={tmp_path}/job.log"]
    job = submit(cluster, tmp_path, small(byte_dataset, tmp_path / "run"), options=options)
    assert cluster.ended(job)["ExitCode"] == "2:0"
    assert "megallama: a job array would train one run many times" in said(tmp_path)


def test_shellcheck_finds_nothing(cluster: Cluster) -> None:
    scripts = sorted(str(path) for path in [*ROOT.glob("slurm/*.sh"), *ROOT.glob("tests/slurm/*.sh")])
    assert cluster.call("shellcheck", "--external-sources", *scripts, check=False) == ""
