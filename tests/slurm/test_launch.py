"""`megallama launch` on a real Slurm."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.runs import assert_same_run, outcome, saved_steps
from tests.launching import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.runs import STEPS, small, wait_for_steps
from tests.slurm.test_jobs import standing_still

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ODD = "a 100%j, $(touch PWNED) `run` 'a' \"b\" *;n#1é"
"""What a shell, sbatch and srun would each take for something else."""


def test_launch_sends_shows_and_stops_a_run_which_goes_on_later(
    cluster: Cluster, byte_dataset: str, straight_tp2: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / ODD
    words = ["configs/7b.yaml", *small(byte_dataset, run_dir)]

    def launch(*more: str, check: bool = True) -> str:
        return cluster.call("megallama", "launch", *words, *more, check=check, timeout=120, MEGALLAMA_PREFLIGHT="no")

    options = ["--option=--nodelist=n1,n2", f"--option=--comment={ODD} a\\b"]
    sent = launch("--nodes", "2", "--per-node", "1", "--chain", "2", *options)
    assert f"{run_dir}/job.sh" in sent
    job = sent.removeprefix("job ").partition(",")[0]
    assert f"Comment={ODD} a\\b" in cluster.call("scontrol", "show", "job", job)
    assert "already; see it with --status" in launch("--nodes", "2", "--per-node", "1", check=False)
    wait_for_steps(cluster, run_dir, 5)
    with ThreadPoolExecutor() as pool:
        with standing_still(cluster, job, run_dir):  # what is asked here takes as long as all steps
            status = launch("--status")
            stopping = pool.submit(launch, "--stop")
        said = stopping.result()
    assert "RUNNING on n[1-2]" in status
    assert "PENDING (Dependency)" in status
    assert "last start: running" in status
    assert "it waited, and is cancelled" in said
    assert "it is asked to save and end" in said
    assert outcome(run_dir)["status"] == "requeue"
    assert saved_steps(run_dir) == [outcome(run_dir)["step"]]
    assert "no job of" in launch("--status")
    assert "no job of" in launch("--stop", check=False)

    launch("--nodes", "2", "--per-node", "1")
    followed = launch("--follow")
    assert f"continues {run_dir}" in followed
    assert f"step {STEPS}  done" in followed
    assert json.loads((run_dir / "environment.json").read_text())["topology"]["tp"] == 2
    assert_same_run(run_dir, straight_tp2)
    assert list(run_dir.glob("logs/job-*.log"))
    assert not any(Path(path).exists() for path in ("PWNED", run_dir / "PWNED", ROOT / "PWNED"))


def test_a_job_that_slurm_refuses_is_one_sentence(cluster: Cluster, byte_dataset: str, tmp_path: Path) -> None:
    words = ["configs/7b.yaml", *small(byte_dataset, tmp_path / "run"), "--nodes=2", "--per-node=2"]
    said = cluster.call("megallama", "launch", *words, "--option=--partition=nowhere", check=False)
    assert said.startswith("megallama: sbatch refused: ")
    assert "nowhere" in said or "partition" in said


def test_the_winner_of_a_search_is_a_job_that_slurm_takes_and_a_config_that_trains(
    cluster: Cluster, byte_dataset: str, tmp_path: Path
) -> None:
    def search(name: str, *words: str) -> str:
        files = ["--write", str(tmp_path / f"{name}.yaml"), "--sbatch", str(tmp_path / f"{name}.sh")]
        cluster.call("megallama", "plan", "configs/7b.yaml", "--search", *words, *files)
        return str(tmp_path / f"{name}.sh")

    cluster.call("sbatch", "--test-only", search("gpus", "--gpus=16", "--gpu=h100"))

    figures = {"peak_tflops": 0.1, "memory_tb_s": 0.02, "memory_gib": 8, "gpus_per_node": 1, "nic_gb_s": 1}
    hardware = tmp_path / "hardware.yaml"
    hardware.write_text(json.dumps({"cpu": figures | {"efficiency": {"mine": 0.5}}}))
    run_dir = tmp_path / "run"
    file = search("cpus", *small(byte_dataset, run_dir), "--gpus=2", "--gpu=cpu", f"--hardware={hardware}")
    words = [f"--output={tmp_path}/job.log", "--nodelist=n1,n2", file, "train.steps=6"]
    ended = cluster.ended(cluster.submit(*words, MEGALLAMA_PREFLIGHT="no"))
    assert (ended["JobState"], ended["NumNodes"]) == ("COMPLETED", "2"), (tmp_path / "job.log").read_text()
    assert (outcome(run_dir)["status"], outcome(run_dir)["step"]) == ("done", 6)
