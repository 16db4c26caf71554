"""What each launcher's variables mean, and what is said of those that mean nothing."""

from __future__ import annotations

import os

import pytest
import torch

from megallama.errors import UserError
from megallama.parallel.launch import Launch, first_host

PLACE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29511"}
SLURM_JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[01-03,7],other", "SLURM_NTASKS": "12"}
SLURM_TASK = {
    **SLURM_JOB,
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_STEP_NODELIST": "node[02-03]",
    "SLURM_STEP_TASKS_PER_NODE": "8,1",
    "SLURM_PROCID": "8",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {
    **PLACE,
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "1",
}
STEP_PORT = 10000 + (4711 + 2 * 104729) % 20000


@pytest.mark.parametrize(
    ("said", "launch"),
    [
        ({}, Launch()),
        ({"LOCAL_RANK": "1", "RANK": "", **PLACE}, Launch(local_rank=1)),
        ({"WORLD_SIZE": "1"}, Launch()),
        (
            TORCHRUN,
            Launch(3, 1, 4, 2, elastic=True, address="10.0.0.1", port=29511, attempt="1", hosted=True),
        ),
        (
            {**PLACE, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
            Launch(1, 1, 2, 2, address="10.0.0.1", port=29511),
        ),
        (SLURM_TASK, Launch(8, 0, 9, 1, address="node02", port=STEP_PORT)),
        (SLURM_TASK | PLACE, Launch(8, 0, 9, 1, address="10.0.0.1", port=29511)),
        (SLURM_TASK | {"SLURM_STEP_TASKS_PER_NODE": "9", "SLURM_NODEID": "0"}, Launch(8, 0, 9, 9, port=STEP_PORT)),
        (SLURM_TASK | {"SLURM_STEP_ID": "4294967290"}, Launch()),
        (SLURM_JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, Launch()),
        (SLURM_TASK | TORCHRUN, Launch(3, 1, 4, 2, elastic=True, address="10.0.0.1", port=29511, attempt="1")),
        (OPEN_MPI | PLACE, Launch(3, 1, 4, 2, address="10.0.0.1", port=29511)),
        (OPEN_MPI | SLURM_JOB, Launch(3, 1, 4, 2, address="node01")),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "x"}, Launch(3, 1, 4, 4, port=23923)),
        (SLURM_TASK | {"PMI_RANK": "3", "PMI_SIZE": "4"}, Launch(3, 0, 4, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, Launch(1, 1, 2, 2)),
    ],
    ids=[
        "nothing",
        "an address alone",
        "one of one",
        "torchrun",
        "deepspeed",
        "srun",
        "srun with an address",
        "srun on one node",
        "a shell of salloc",
        "the script of sbatch",
        "torchrun in srun",
        "mpirun",
        "mpirun in a Slurm job",
        "mpirun on one node",
        "mpirun of another MPI by way of srun",
        "mpirun of another MPI",
    ],
)
def test_variables_of_a_launcher(said: dict[str, str], launch: Launch) -> None:
    found = Launch.from_environment(said)
    names = ("rank", "local_rank", "world_size", "local_world_size", "elastic", "address", "port", "attempt")
    assert {name: getattr(found, name) for name in names} == {name: getattr(launch, name) for name in names}
    assert found.hosted == (said.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def test_processors_of_a_node_are_shared_and_those_of_a_slurm_task_are_its_own() -> None:
    here = len(os.sched_getaffinity(0))
    assert Launch.from_environment(TORCHRUN).processors == max(1, here // 2)
    alone = SLURM_TASK | {"SLURM_STEP_TASKS_PER_NODE": "9", "SLURM_NODEID": "0"}
    assert Launch.from_environment(alone).processors == max(1, here // 9)
    for cpus in (1, 999):
        task = Launch.from_environment(alone | {"SLURM_CPUS_PER_TASK": str(cpus)})
        assert task.processors == min(here, cpus)
    assert Launch.from_environment(alone | {"SLURM_CPUS_PER_TASK": "2"} | TORCHRUN).processors == max(1, here // 2)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"RANK": "0"}, ["RANK=0 is set and WORLD_SIZE is not", "or unset RANK"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 is set and RANK is not", "or unset WORLD_SIZE"]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["MASTER_ADDR and MASTER_PORT are not", "start by torchrun"]),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, ["and MASTER_PORT is not"]),
        ({"RANK": "2", "WORLD_SIZE": "2", **PLACE}, ["RANK=2 is not below WORLD_SIZE=2", "0 to 1"]),
        ({"RANK": "one", "WORLD_SIZE": "2", **PLACE}, ["RANK='one' is not a number"]),
        ({"RANK": "-1", "WORLD_SIZE": "2", **PLACE}, ["RANK='-1'"]),
        ({"RANK": "٣", "WORLD_SIZE": "9", **PLACE}, ["is not a number"]),
        ({"RANK": "0", "WORLD_SIZE": "0", **PLACE}, ["no WORLD_SIZE of 1 or more"]),
        ({"RANK": "0", "WORLD_SIZE": "9" * 400, **PLACE}, ["WORLD_SIZE='999"]),
        (TORCHRUN | {"LOCAL_RANK": "2"}, ["local rank 2 of 2 ranks on this node"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, ["of 8 ranks on this node does not go with WORLD_SIZE=4"]),
        (TORCHRUN | {"MASTER_PORT": "70000"}, ["MASTER_PORT=70000 is not a port"]),
        (TORCHRUN | {"MASTER_PORT": "http"}, ["MASTER_PORT='http' is not a number"]),
        ({"LOCAL_RANK": "gpu0"}, ["LOCAL_RANK='gpu0'"]),
        ({"OMPI_COMM_WORLD_RANK": "0"}, ["OMPI_COMM_WORLD_RANK=0 is set and no OMPI_COMM_WORLD_SIZE"]),
        (OPEN_MPI, ["OMPI_COMM_WORLD_RANK=3 of 4 ranks on several nodes", "mpirun -x MASTER_ADDR="]),
        ({"PMI_RANK": "5", "PMI_SIZE": "4"}, ["PMI_RANK=5 is not below PMI_SIZE=4"]),
        ({k: v for k, v in SLURM_TASK.items() if "N" not in k.split("_", 1)[1]}, ["SLURM_PROCID=8", "SLURM_STEP_NUM"]),
        (SLURM_TASK | {"SLURM_STEP_ID": "four"}, ["SLURM_STEP_ID='four'"]),
    ],
)
def test_variables_that_are_no_job_are_refused(said: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        Launch.from_environment(said)
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)
    assert len(str(refused.value)) < 320


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("node[01-03,7]", "node01"),
        ("node[7,01-03],a", "node7"),
        ("rack[1-2]n[03-04,9]-ib,x[1-2]", "rack1n03-ib"),
        ("gpu-a[100-199],gpu-b1", "gpu-a100"),
    ],
)
def test_the_first_of_slurm_s_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_steps_and_starts_of_a_job_meet_on_ports_of_their_own() -> None:
    changes: list[dict[str, str]] = [{}, {"SLURM_STEP_ID": "3"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "4712"}]
    ports = [Launch.from_environment(SLURM_TASK | change).port for change in changes]
    assert len(set(ports)) == 4
    assert all(10000 <= port < 30000 for port in ports)


def test_deepspeed_is_told_the_device_of_a_rank_that_sees_its_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "LOCAL_RANK", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    Launch(rank=3, world_size=4, local_rank=3, local_world_size=4).prepare(torch.device("cuda", 0))
    assert (os.environ["DS_ACCELERATOR"], os.environ["LOCAL_RANK"]) == ("cuda", "0")
    assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0", "deepspeed compares"
    assert "PYTORCH_ALLOC_CONF" not in os.environ, "the user has set the allocator up"
    del os.environ["PYTORCH_CUDA_ALLOC_CONF"]
    Launch().prepare(torch.device("cuda", 0))
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("DS_ACCELERATOR", "LOCAL_RANK", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        del os.environ[name]  # not by monkeypatch, which would bring back what was set here
