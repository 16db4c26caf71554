"""Ranks that meet, or do not: each way to miss each other ends in one sentence, soon."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megallama.parallel.join as joining
from megallama.errors import SharedError, UnreachableError, UserError
from megallama.parallel.door import ANSWER_SECONDS
from megallama.parallel.join import join, tell
from megallama.parallel.launch import FIRST_PORT, Launch
from megallama.parallel.spawn import run_ranks
from tests.launching import PRETRAIN, arguments, execute, losses, pretrain_here
from tests.test_bad_input import assert_one_sentence
from tests.test_launchers import deepspeed, free_port

# What the processes of a job find in their environment, by rank of two on one node.
LAUNCHERS = {
    "srun": lambda rank, job: {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "unknown[1-2].invalid",
    },
    "Open MPI": lambda rank, job: {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "PMIX_NAMESPACE": str(job),
    },
    "PMI": lambda rank, job: {"PMI_RANK": str(rank), "PMI_SIZE": "2", "MASTER_PORT": str(FIRST_PORT + job)},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_of_a_launcher_that_knows_no_torch_are_one_job(launcher: str, byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", "train.steps=3")
    assert run_ranks(pretrain_under, 2, words, launcher, free_job(), timeout=60.0) == [(0, "")] * 2
    assert len(losses(tmp_path / "run")) == 3
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert len(list(checkpoint.glob("rank_*.bin"))) == 2


def free_job() -> int:
    """The number of a job whose first step under srun meets at a free port."""
    return free_port() - FIRST_PORT


def pretrain_under(launch: Launch, words: list[str], launcher: str, job: int) -> tuple[int, str]:
    def only_its_own() -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ.update(LAUNCHERS[launcher](launch.rank, job))

    return pretrain_here(launch, words, only_its_own)


@pytest.mark.parametrize(
    ("rank", "world_size", "device", "words"),
    [
        (1, 4, "cpu", ["rank 1 on ", "with a world size of 4, and rank 0 on ", " with 2"]),
        (1, 2, "meta", ["rank 1 on ", "would train on meta, and rank 0 on ", " on cpu"]),
    ],
    ids=["another world size", "another device"],
)
def test_a_rank_of_another_kind_is_refused_by_all(rank: int, world_size: int, device: str, words: list[str]) -> None:
    first, second = run_ranks(meet_as, 2, rank, world_size, device, timeout=30.0)
    assert first == second
    assert first[0] == "SharedError"
    assert [word for word in words if word not in first[1]] == [], first


def meet_as(launch: Launch, rank: int, world_size: int, device: str) -> tuple[str, str]:
    """Rank 1 as what is given."""
    if launch.rank == 1:
        launch = replace(launch, rank=rank, world_size=world_size)
    stay_for_all()
    try:
        join(launch, torch.device(device if launch.rank else "cpu"))
    except UserError as error:
        return type(error).__name__, str(error)
    return "joined", ""


def stay_for_all() -> None:
    """Let rank 0, which leaves when all have heard how it ends, wait longer for those that a busy machine holds up."""
    joining._LEAVING_SECONDS = 20.0


def test_two_processes_of_one_rank_are_told() -> None:
    said = run_ranks(meet_twice, 3, timeout=30.0)
    assert said[0] == said[1] == said[2]
    assert said[0][0] == "SharedError"
    assert "two processes are rank 1 of 3" in said[0][1]


def meet_twice(launch: Launch) -> tuple[str, str]:
    return meet_as(replace(launch, rank=min(launch.rank, 1)), 1, launch.world_size, "cpu")


def test_a_rank_too_many_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    """As of another job that was given the same port."""
    assert run_ranks(meet_late, 3, tmp_path, timeout=30.0) == ["summed 2", "summed 2", "UserError"]


def meet_late(launch: Launch, folder: Path) -> str:
    """Two ranks of a job of two, and one more when they have met."""
    two = replace(launch, world_size=2, local_world_size=2)
    if launch.rank == 2:
        wait_for(folder / "met")
        try:
            join(replace(two, rank=1), torch.device("cpu"))
        except UserError as error:
            return type(error).__name__
        finally:
            (folder / "gone").touch()
        return "joined"
    join(two, torch.device("cpu"))
    total = torch.ones(1)
    dist.all_reduce(total)
    if launch.rank == 0:  # it hosts the store, and stays until the one too many has gone
        (folder / "met").touch()
        wait_for(folder / "gone")
    dist.barrier()
    return f"summed {int(total)}"


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


def test_a_rank_that_fails_before_it_has_met_the_others_is_heard_by_them() -> None:
    assert run_ranks(meet_or_fail, 3, timeout=30.0) == ["rank 2: it cannot"] * 2 + ["True"]


def meet_or_fail(launch: Launch) -> str:
    if launch.rank == 2:
        return str(tell(launch, "rank 2: it cannot", 20.0))
    stay_for_all()
    try:
        join(launch, torch.device("cpu"))
    except SharedError as error:
        return str(error)
    return "joined"


def test_a_rank_0_that_dies_at_the_door_does_not_keep_the_others() -> None:
    assert run_ranks(meet_at_a_closed_door, 2, timeout=30.0) == ["", "UnreachableError"]


def meet_at_a_closed_door(launch: Launch) -> str:
    """Rank 0 leaves when rank 1 has come."""
    if launch.rank == 0:
        door = launch.door
        assert door is not None
        for _ in range(2):  # the look whether it answers, and the store's own connection
            door.accept()[0].close()
        door.close()
        return ""
    os.environ["MEGALLAMA_ANSWER_SECONDS"] = "1"
    try:
        join(launch, torch.device("cpu"))
    except UserError as error:
        return type(error).__name__
    return "joined"


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_port_that_is_taken_is_told_at_once_under_python(tmp_path: Path) -> None:
    with taken_port() as port:
        outcome = execute(
            [sys.executable, PRETRAIN, *arguments("nowhere", tmp_path / "run")],
            tmp_path,
            **by_hand(0, "127.0.0.1", port),
        )
    assert (outcome.code, outcome.out) == (2, "")
    assert_one_sentence(outcome.err, [f"port {port}, where the ranks are to meet", "in use"])
    # Other programs may hold the ports that follow.
    free = re.search(r"\(port (\d+) is free\)", outcome.err)
    assert free is not None
    assert port < int(free[1]) < port + 100


def test_a_port_that_is_taken_ends_deepspeed(byte_dataset: str, tmp_path: Path) -> None:
    script, loaded = tmp_path / "timed.py", tmp_path / "loaded"
    # Rank 0 begins when rank 1 has torch: what a busy machine takes for the imports is not what is asked.
    script.write_text(
        "import os, runpy, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    import megallama.parallel.join\n"
        f"    open({str(loaded)!r}, 'w').close()\n"
        "else:\n"
        f"    while not os.path.exists({str(loaded)!r}): time.sleep(0.1)\n"
        "    print('began at', time.time(), file=sys.stderr)\n"
        f"runpy.run_path({PRETRAIN!r}, run_name='__main__')\n"
    )
    with taken_port() as port:
        command = [*deepspeed("--num_gpus=2"), f"--master_port={port}", str(script)]
        outcome = execute([*command, *arguments(byte_dataset, tmp_path / "run")], tmp_path)
    assert outcome.code == 2
    (sentence,) = outcome.sentences
    assert f"port {port}, where the ranks are to meet" in sentence
    assert "Traceback" not in outcome.err
    assert outcome.seconds_since("began at") < 30, "rank 1 is not killed by deepspeed, 30 s after it noticed"
    assert outcome.left_over == []


def test_an_address_that_answers_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALLAMA_ANSWER_SECONDS", "1")
    look_up = socket.getaddrinfo

    def without_network(host: str, *words: Any) -> Any:
        """A real look-up of a name that is nowhere may take longer than the test waits."""
        if host == "nowhere.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *words)

    monkeypatch.setattr(socket, "getaddrinfo", without_network)
    assert ANSWER_SECONDS < 25
    for address, port, why in (("127.0.0.1", free_port(), "Connection refused"), ("nowhere.invalid", 1, "resolve")):
        with pytest.raises(UnreachableError) as refused:
            run_here(replace(Launch(1, 1, 2, 2), address=address, port=port))
        assert f"MASTER_ADDR={address!r}, MASTER_PORT={port}" in str(refused.value)
        assert why in str(refused.value)


def test_what_answers_and_is_no_rank_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that says something, and one that hangs up."""
    monkeypatch.setenv("MEGALLAMA_ANSWER_SECONDS", "1")
    for said in (b"SSH-2.0-OpenSSH_9.2\r\n", b""):
        with socket.create_server(("127.0.0.1", 0)) as other:
            threading.Thread(target=serve, args=(other, said), daemon=True).start()
            with pytest.raises(UnreachableError, match="is not rank 0 of this job"):
                run_here(Launch(1, 1, 2, 2, port=other.getsockname()[1]))


def serve(listener: socket.socket, said: bytes) -> None:
    while True:
        try:
            with listener.accept()[0] as connection:
                connection.sendall(said)
        except OSError:
            return


def test_left_over_variables_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell inside another job: of two ranks, one."""
    monkeypatch.setenv("MEGALLAMA_ANSWER_SECONDS", "1")
    with pytest.raises(SharedError) as refused:
        run_here(Launch(0, 0, 2, 2, port=free_port()))
    for words in ("of 2 ranks only rank 0 has come", "unset RANK and WORLD_SIZE", "set MEGALLAMA_ANSWER_SECONDS"):
        assert words in str(refused.value)


def test_no_number_of_seconds_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALLAMA_ANSWER_SECONDS", "soon")
    with pytest.raises(UserError, match="MEGALLAMA_ANSWER_SECONDS='soon' is not a number of seconds above 0; use 20"):
        run_here(Launch(1, 1, 2, 2, port=free_port()))


def test_half_an_environment_is_one_sentence_under_python(tmp_path: Path) -> None:
    outcome = execute([sys.executable, PRETRAIN, *arguments("nowhere", tmp_path / "run")], tmp_path, RANK="0")
    assert (outcome.code, outcome.out) == (2, "")
    assert_one_sentence(outcome.err, ["RANK=0 is set and WORLD_SIZE is not"])


def test_a_mistake_that_all_tasks_of_srun_make_is_told_once(tmp_path: Path) -> None:
    """Though nobody ends the others when rank 0 leaves."""
    script = (
        f"export SLURM_JOB_ID={free_job()} SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_TASKS_PER_NODE=2\n"
        'SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!\n'
        'SLURM_PROCID=1 SLURM_LOCALID=1 "$@"; second=$?\n'
        "wait $first; echo $? $second"
    )
    command = [sys.executable, PRETRAIN, *arguments("nowhere", tmp_path / "run", "train.stepz=4")]
    outcome = execute(["bash", "-c", script, "two", *command], tmp_path)
    assert outcome.out == "2 2\n"
    assert_one_sentence(outcome.err, ["train.stepz", "train.steps"])


def by_hand(rank: int, address: str, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def run_here(launch: Launch) -> None:
    join(launch, torch.device("cpu"))
