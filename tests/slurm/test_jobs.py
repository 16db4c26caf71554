"""Jobs on a real Slurm: the shipped files as they are, the model shrunk by overrides, and what happens to jobs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.faults.runs import assert_same_run, losses_by_step, outcome, saved_steps
from tests.launching import ROOT, events
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.runs import STEPS, log, small, steps_done, wait_for_steps

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

WITHOUT_LOOK = {"MEGALLAMA_PREFLIGHT": "no"}
"""Ten seconds less for each start; the first test, that of two jobs and those of bad nodes have the look."""
ONE_RANK_EACH = WITHOUT_LOOK | {"MEGALLAMA_NPROC_PER_NODE": "1"}
"""tp 2 over the nodes; half of the processes to start."""


def test_two_nodes_train_what_four_processes_train_without_slurm(
    cluster: Cluster, byte_dataset: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, small(byte_dataset, run_dir))
    cluster.wait(lambda: cluster.job(job)["JobState"] == "RUNNING", 30)
    began = time.monotonic()
    cluster.wait(lambda: steps_done(run_dir) >= 1, 90)
    first_step = time.monotonic() - began
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["NodeList"], ended["ExitCode"]) == ("COMPLETED", "n[1-2]", "0:0"), said(tmp_path)
    facts = json.loads((run_dir / "environment.json").read_text())
    assert facts["topology"] == {"pp": 1, "dp": 2, "cp": 1, "tp": 2}
    assert_same_run(run_dir, straight)
    names = {path.name.removesuffix(".log") for path in (run_dir / "logs").glob("*.log")}
    assert names == {f"{job}-0-{what}" for what in ("preflight", "node0", "node1", *(f"rank{n}" for n in range(4)))}
    assert f"step {STEPS}  done" in log(run_dir, job, 0, "rank0")
    with capsys.disabled():
        print(f"\njob start to first step: {first_step:.1f} s\n{cluster.controller_log(job)}")


def test_a_job_that_comes_back_with_one_node_instead_of_two_goes_on_there(
    cluster: Cluster, byte_dataset: str, straight: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, small(byte_dataset, run_dir), options=["--nodes=1-2"], **WITHOUT_LOOK)
    wait_for_steps(cluster, run_dir, 12)
    with drained(cluster, NODES[1:]):
        cluster.call("scancel", "--batch", "--signal=USR1", job)
        ended = cluster.ended(job)
    assert (ended["JobState"], ended["NumNodes"], ended["Restarts"]) == ("COMPLETED", "1", "1"), said(tmp_path)
    assert [event["step"] for event in events(run_dir, "resume")] == [events(run_dir, "stop")[0]["step"]]
    assert json.loads((run_dir / "environment.json").read_text())["topology"]["dp"] == 1
    ours, theirs = losses_by_step(run_dir), losses_by_step(straight)
    assert ours.keys() == theirs.keys()
    for step, loss in theirs.items():  # in bf16, where a last bit of a master turns a rounding over
        assert float.fromhex(ours[step]) == pytest.approx(float.fromhex(loss), rel=2e-4)


def test_a_job_that_reaches_its_time_limit_saves_and_comes_back_until_it_is_done(
    cluster: Cluster, byte_dataset: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    limit = ["--time=1", "--signal=B:USR1@10"]
    job = submit(cluster, tmp_path, small(byte_dataset, run_dir), options=limit, **WITHOUT_LOOK)
    wait_for_steps(cluster, run_dir, 3)
    slow = rank_zero(cluster, job)
    slow.suspend()  # or a fast machine has done all steps by then
    cluster.wait((run_dir / "STOP").exists, 60)
    slow.resume()
    ended = cluster.ended(job, 240)
    assert ended["JobState"] == "COMPLETED", said(tmp_path)
    assert int(ended["Restarts"]) >= 1
    stops = events(run_dir, "stop")
    assert [stop["status"] for stop in stops] == ["requeue"] * (len(stops) - 1) + ["done"]
    assert {stop["reason"] for stop in stops[:-1]} == {"stopped by the file STOP"}
    assert [event["step"] for event in events(run_dir, "resume")] == [stop["step"] for stop in stops[:-1]]
    assert_same_run(run_dir, straight)
    with capsys.disabled():
        print(f"\n{cluster.controller_log(job)}")


def test_a_job_survives_signals_a_requeue_and_preemption(
    cluster: Cluster, byte_dataset: str, straight_tp2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, small(byte_dataset, run_dir, "checkpoint.every=10"), **ONE_RANK_EACH)
    times = {}
    for count, words in enumerate(
        [["scancel", "--signal=USR1", job], ["scancel", "--batch", "--signal=USR1", job], ["scontrol", "requeue", job]]
    ):
        wait_for_steps(cluster, run_dir, 5)
        asked = time.monotonic()
        with standing_still(cluster, job, run_dir):
            cluster.call(*words)
        wait_for_restarts(cluster, job, count + 1)
        times[" ".join(words[:-1])] = time.monotonic() - asked
        cluster.wait(lambda count=count: len(events(run_dir, "stop")) > count, 30)  # scontrol requeues, then ends it
    stops = events(run_dir, "stop")
    reasons = ["stopped by a signal", "stopped by the file STOP", "stopped by a signal"]
    assert [(stop["status"], stop["reason"]) for stop in stops] == [("requeue", reason) for reason in reasons]

    wait_for_steps(cluster, run_dir, 5)
    with standing_still(cluster, job, run_dir):
        urgent = cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_for_restarts(cluster, job, 4)
    assert cluster.ended(urgent)["JobState"] == "COMPLETED"
    assert [(stop["status"], stop["reason"]) for stop in events(run_dir, "stop")[3:]] == [("requeue", reasons[0])]

    assert cluster.ended(job)["JobState"] == "COMPLETED", said(tmp_path)
    assert_same_run(run_dir, straight_tp2)
    with capsys.disabled():
        print("\nfrom the request to the requeue:", {what: f"{took:.1f} s" for what, took in times.items()})
        print(cluster.controller_log(job))


def test_a_job_survives_the_death_of_its_nodes(
    cluster: Cluster, byte_dataset: str, straight_tp2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, small(byte_dataset, run_dir, "checkpoint.every=10"), **ONE_RANK_EACH)
    for count, place in ((1, -1), (2, 0)):  # the first node has run.sh as well
        wait_for_steps(cluster, run_dir, 12)
        victim = cluster.nodes(job)[place]
        cluster.stop_node(victim)
        wait_for_restarts(cluster, job, count)
        cluster.wait(lambda: cluster.job(job)["JobState"] == "RUNNING", 90)
        assert victim not in cluster.nodes(job)
        cluster.start_node(victim)
    assert cluster.ended(job)["JobState"] == "COMPLETED", said(tmp_path)
    assert_same_run(run_dir, straight_tp2)
    with capsys.disabled():
        print(f"\n{cluster.controller_log(job)}")
    cluster.wait(lambda: cluster.idle_nodes() == set(NODES), 60)


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(
    cluster: Cluster, byte_dataset: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, small(byte_dataset, run_dir), **ONE_RANK_EACH)
    wait_for_steps(cluster, run_dir, 3)
    cluster.call("scancel", job)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    cluster.wait(lambda: cluster.processes(job) == [], 10)
    assert outcome(run_dir)["status"] == "requeue"
    assert saved_steps(run_dir) == [outcome(run_dir)["step"]]


def test_two_jobs_share_their_nodes(cluster: Cluster, byte_dataset: str, straight_tp2: Path, tmp_path: Path) -> None:
    options = ["--oversubscribe", "--gpus-per-node=4", "--nodelist=n1,n2"]
    folders = [tmp_path / "one", tmp_path / "two"]
    jobs = []
    for folder in folders:
        folder.mkdir()
        one_each = {"MEGALLAMA_NPROC_PER_NODE": "1"}
        jobs.append(submit(cluster, folder, small(byte_dataset, folder / "run"), options=options, **one_each))
    cluster.wait(lambda: all(cluster.job(job)["JobState"] == "RUNNING" for job in jobs), 30)
    for job, folder in zip(jobs, folders, strict=True):
        assert cluster.ended(job)["JobState"] == "COMPLETED", said(folder)
        assert_same_run(folder / "run", straight_tp2)


def test_a_run_that_fails_at_its_start_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, small(str(tmp_path / "nowhere"), run_dir), **ONE_RANK_EACH)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), said(tmp_path)
    assert f"job {job} was started 3 times, failed 3 times, and made no checkpoint after step 0" in said(tmp_path)
    assert f"megallama: {tmp_path}/nowhere.idx does not exist; build the dataset" in said(tmp_path), "and why"


def test_ranks_that_srun_starts_pass_their_exit_code_on(
    cluster: Cluster, byte_dataset: str, straight_tp2: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    script = tmp_path / "job.sh"
    words = " ".join(f"'{word}'" for word in small(byte_dataset, run_dir))
    (documented,) = re.findall(r"^(srun .*) --config", (ROOT / "docs" / "clusters.md").read_text(), re.MULTILINE)
    script.write_text(
        "#!/usr/bin/env bash\n"
        "export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((30000 + SLURM_JOB_ID % 2000))\n"
        f"{documented} --config configs/7b.yaml {words}\n"
    )
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/job.log", str(script)]
    job = cluster.submit(*options)
    wait_for_steps(cluster, run_dir, 3)
    cluster.call("scancel", "--signal=USR1", job)
    assert cluster.ended(job)["ExitCode"] == "75:0", said(tmp_path)
    assert (outcome(run_dir)["status"], outcome(run_dir)["reason"]) == ("requeue", "stopped by a signal")
    assert saved_steps(run_dir) == [outcome(run_dir)["step"]]
    assert cluster.ended(cluster.submit(*options))["ExitCode"] == "0:0", said(tmp_path)
    assert outcome(run_dir)["status"] == "done"
    assert_same_run(run_dir, straight_tp2)


def test_srun_alone_makes_one_job_of_its_tasks_and_the_script_around_it_is_one_process(
    cluster: Cluster, byte_dataset: str, tmp_path: Path
) -> None:
    """Also for a step that has fewer tasks than the job, on the second of its nodes, and beside another."""
    words = [*small(byte_dataset, tmp_path / "NAME"), "train.stop_after=2", "train.steps=4"]
    train = f"python launch/pretrain.py --config configs/7b.yaml {' '.join(words)}"
    step = "srun --overlap --nodes=1 --ntasks=2 --relative="
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/usr/bin/env bash\n"
        f"{train.replace('NAME', 'script')} parallel.tensor=1 || exit\n"
        f"{step}0 {train.replace('NAME', 'first')} & one=$!\n"
        f"{step}1 {train.replace('NAME', 'second')} & two=$!\n"
        "wait $one && wait $two\n"
    )
    job = cluster.submit("--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/job.log", str(script))
    assert cluster.ended(job)["JobState"] == "COMPLETED", said(tmp_path)
    facts = {
        name: json.loads((tmp_path / name / "environment.json").read_text())["topology"]
        for name in ("script", "first", "second")
    }
    assert {name: topology["tp"] for name, topology in facts.items()} == {"script": 1, "first": 2, "second": 2}


def submit(
    cluster: Cluster, folder: Path, overrides: list[str], nodes: int = 2, options: list[str] | None = None, **more: str
) -> str:
    """`sbatch slurm/7b.sh`; a log in `folder`."""
    words = [f"--nodes={nodes}", f"--output={folder}/job.log", *(options or [])]
    return cluster.submit(*words, "slurm/7b.sh", *overrides, **more)


def wait_for_restarts(cluster: Cluster, job: str, count: int) -> None:
    cluster.wait(lambda: int(cluster.job(job)["Restarts"]) >= count, 90)


@contextmanager
def drained(cluster: Cluster, nodes: Sequence[str]) -> Iterator[None]:
    """Nodes that take no new job."""
    names = f"nodename={','.join(nodes)}"
    cluster.call("scontrol", "update", names, "state=drain", "reason=test")
    try:
        yield
    finally:
        cluster.call("scontrol", "update", names, "state=resume")


def rank_zero(cluster: Cluster, job: str) -> psutil.Process:
    """The process that trains as rank 0."""
    trains = [psutil.Process(pid) for pid in cluster.processes(job)]
    (found,) = [
        process
        for process in trains
        if process.environ().get("RANK") == "0" and process.cmdline()[1:2] == ["launch/pretrain.py"]
    ]
    return found


@contextmanager
def standing_still(cluster: Cluster, job: str, run_dir: Path) -> Iterator[None]:
    """Rank 0 takes no step until what is asked of the job here has reached it, or a fast machine has done all by then.

    A signal waits for it. Slurm wakes what it is about to end.
    """
    rank = rank_zero(cluster, job)
    rank.suspend()
    try:
        yield
        cluster.wait(lambda: (run_dir / "STOP").exists() or is_signalled(rank.pid), 60)
    finally:
        with suppress(psutil.NoSuchProcess):
            rank.resume()


def is_signalled(pid: int) -> bool:
    """Whether a signal waits for a process, or it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return re.search(r"^(State:\s+Z|ShdPnd:\s+0*[1-9a-f])", status, re.MULTILINE) is not None


def said(folder: Path) -> str:
    """The job's own log."""
    return (folder / "job.log").read_text()
