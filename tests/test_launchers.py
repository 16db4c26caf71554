"""The same run under every launcher, started as a user starts it; and what is left when a rank fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import SystemRandom

import pytest

from megallama.parallel.door import _is_free
from tests.launching import BIN, PRETRAIN, ROOT, Outcome, arguments, events, execute, losses

# Raises on rank 1 of the world in step 2, while rank 0 waits for it in a collective.
FAULTY = f"""
import os, sys, time
os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, {str(ROOT)!r})
import megallama.train.loop
train_step, calls = megallama.train.loop.train_step, []

def faulty(run, *arguments):
    calls.append(run)
    if run.mesh.rank == 1 and len(calls) == 2:
        print("raised at", time.time(), file=sys.stderr, flush=True)
        raise RuntimeError("planted in step 2")
    return train_step(run, *arguments)

megallama.train.loop.train_step = faulty
from launch.pretrain import run
run()
"""


def torchrun(num_ranks: int) -> list[str]:
    return [str(BIN / "torchrun"), f"--master-port={free_port()}", f"--nproc-per-node={num_ranks}"]


def deepspeed(*options: str) -> list[str]:
    """Without a host file of this machine, and on a port of its own."""
    return [str(BIN / "deepspeed"), "--hostfile=/dev/null", f"--master_port={free_port()}", *options]


@pytest.fixture(scope="module")
def plain(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], float]:
    """Losses and seconds of plain python, one process."""
    home = tmp_path_factory.mktemp("plain")
    outcome = execute([sys.executable, PRETRAIN, *arguments(byte_dataset, home / "run")], home)
    assert_trained(outcome, home / "run", num_ranks=1)
    return losses(home / "run"), outcome.seconds


def test_torchrun_at_tp_2_gives_the_losses_of_plain_python(
    byte_dataset: str, tmp_path: Path, plain: tuple[list[float], float]
) -> None:
    words = arguments(byte_dataset, tmp_path / "run", "parallel.tensor=2")
    assert_trained(execute([*torchrun(2), PRETRAIN, *words], tmp_path), tmp_path / "run", num_ranks=2)
    assert losses(tmp_path / "run") == pytest.approx(plain[0], rel=1e-6)


def test_deepspeed_without_num_gpus_gives_the_losses_of_plain_python(
    byte_dataset: str, tmp_path: Path, plain: tuple[list[float], float]
) -> None:
    words = arguments(byte_dataset, tmp_path / "run")
    assert_trained(execute([*deepspeed(), PRETRAIN, *words], tmp_path), tmp_path / "run", num_ranks=1)
    assert losses(tmp_path / "run") == pytest.approx(plain[0], rel=1e-6)


def test_deepspeed_on_two_ranks_needs_no_compiler_and_no_extension_and_minds_no_lock(
    byte_dataset: str, tmp_path: Path, plain: tuple[list[float], float]
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "deepspeed").symlink_to(BIN / "deepspeed")
    extensions = tmp_path / "torch-extensions"
    locks = [extensions / folder / "deepspeed_shm_comm" / "lock" for folder in (".", "py311_cpu")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    words = arguments(byte_dataset, tmp_path / "run")
    outcome = execute([*deepspeed("--num_gpus=2"), PRETRAIN, *words], tmp_path, PATH=str(tmp_path / "path"))
    assert_trained(outcome, tmp_path / "run", num_ranks=2)
    assert losses(tmp_path / "run") == pytest.approx(plain[0], rel=1e-6)
    # About three times as long as plain python; on a quiet machine well under a minute.
    assert outcome.seconds < max(60.0, 5 * plain[1])
    assert sorted(path for path in extensions.rglob("*") if path.is_file()) == sorted(locks), "nothing was built"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_an_exception_on_one_rank_ends_the_whole_run(launcher: str, byte_dataset: str, tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    command = torchrun(2) if launcher == "torchrun" else deepspeed("--num_gpus=2")
    outcome = execute([*command, str(script), *arguments(byte_dataset, tmp_path / "run")], tmp_path)
    assert outcome.code != 0
    assert outcome.seconds_since("raised at") < 30, "no launcher had to kill the other rank, 30 s after it noticed"
    # Rank 0 may report after it that its peer is gone.
    assert outcome.sentences[0] == "megallama: rank 1 failed", outcome.err
    report = outcome.err.partition("megallama: rank 1 failed\n")[2]
    assert report.startswith("Traceback (most recent call last):")
    assert "RuntimeError: planted in step 2" in report
    assert outcome.left_over == []
    assert len(losses(tmp_path / "run")) == 1, "step 1 was recorded before"
    said = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (said["status"], said["reason"]) == ("failed", "rank 1: RuntimeError: planted in step 2")


def assert_trained(outcome: Outcome, run_dir: Path, num_ranks: int) -> None:
    assert outcome.code == 0, outcome.err
    assert outcome.left_over == []
    assert "Traceback" not in outcome.err
    assert [event["reason"] for event in events(run_dir, "stop")] == ["done"]
    assert json.loads((run_dir / "outcome.json").read_text())["status"] == "done"
    assert len(losses(run_dir)) == 4
    (checkpoint,) = (run_dir / "checkpoints").glob("step_*")
    assert len(list(checkpoint.glob("rank_*.bin"))) == num_ranks


def free_port() -> int:
    """One that is bound later: below those that Linux gives to connections, of which one might take it meanwhile.

    And at random, since tests run beside each other.
    """
    while not _is_free(port := SystemRandom().randrange(20_000, 29_000)):
        pass
    return port
