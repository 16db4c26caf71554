"""The command for a GPU, rehearsed on a CPU: every part that it can do works, and one that fails costs only itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
CONTENDERS = ("engine", "bare", "transformers")
PARTS = [
    *("environment", "zero", "ceilings", "attention", *(f"step-1b-{name}" for name in CONTENDERS)),
    *("step-1b-engine-compile", "pretrain-1b", "resume-1b", "loss-head", "gpu-tests"),
    *("step-1b-bare-compile", "step-1b-transformers-compile"),
]


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal left."""

    code: int
    states: dict[str, str]
    """ok, failed, timed out or skipped, by part."""
    figures: dict[str, str]
    files: list[str]
    """In session.tgz."""


def rehearse(out: Path, *parts: str, **variables: str) -> Rehearsal:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTEST_ADDOPTS", "WHEELS")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "benchmarks/gpu.sh", str(out), "--rehearse", *parts]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert done.stderr == ""
    rows = re.findall(r"^(.{9})  (\S+) +\d+ s  (.*)$", (out / "summary.txt").read_text(), re.MULTILINE)
    states, figures = ({row[1]: row[column] for row in rows} for column in (0, 2))
    with tarfile.open(out / "session.tgz") as archive:
        files = [name.removeprefix("./") for name in archive.getnames()]
    return Rehearsal(done.returncode, {name: state.strip() for name, state in states.items()}, figures, files)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    return rehearse(tmp_path_factory.mktemp("whole"))


def test_every_part_that_a_cpu_can_do_works(whole: Rehearsal) -> None:
    assert whole.states == dict.fromkeys(PARTS, "ok"), whole.figures
    assert whole.code == 0
    assert {"summary.txt", "step-1b-engine.json", "zero-3/metrics.jsonl", "run-1b/metrics.jsonl"} <= set(whole.files)
    assert not [name for name in whole.files if name.startswith("corpus") or "checkpoints" in name]


def test_a_step_has_its_speed_memory_and_kernels(whole: Rehearsal) -> None:
    losses = []
    for name in PARTS:
        if name.startswith("step-"):
            said = whole.figures[name]
            assert re.match(r"[\d.]+ ms/step, [\d,]+ tokens/s, MFU [\d.]+%, peak [\d.]+ GiB", said)
            assert re.search(r"\d+ kernels, busy \d+%, ms: .*attention [\d.]+", said)
            assert re.search(r"; matmul \S+ TFLOP/s, attention \S+$", said)
            assert ("compiled" in said) == name.endswith("-compile")
            losses.append(found(r"loss [\d.]+ to ([\d.]+);", said))
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-3), "the same weights, ids and work"


def test_parts_have_their_figures(whole: Rehearsal) -> None:
    said = whole.figures
    assert re.search(r"torch \S+, deepspeed \S+, transformers \S+; .* cores, ", said["environment"])
    assert len(re.findall(r"zero-\d done, loss [\d.]+ to [\d.]+, norm [\d.]+, saves 2", said["zero"])) == 3
    assert found(r"qkv ([\d.]+)/", said["ceilings"]) > 0 < found(r"copy ([\d.]+) TB/s", said["ceilings"])
    assert re.search(r"takes scaled_dot_product_\w+, default \S+ ms = \S+ TFLOP/s", said["attention"])
    assert found(r"losses differ by (\S+)$", said["loss-head"]) < 1e-2
    assert len(re.findall(r"save of \S+ GiB in \S+ s of which training waits \S+", said["pretrain-1b"])) == 2
    assert found(r"efficiency of .* (\S+)$", said["pretrain-1b"]) > 0
    assert "of 11 steps taken again 11 have the same loss" in said["resume-1b"]
    assert re.search(r"forecast: \S+ ms, predicted \S+ \(", said["resume-1b"])
    assert re.search(r"\d+ (passed|skipped)", said["gpu-tests"])


def test_a_part_that_fails_costs_only_itself(tmp_path: Path) -> None:
    """A rank that does not know of how many it is one is refused; kernels alone are no rank."""
    rehearsal = rehearse(tmp_path, "zero", "attention", RANK="0")
    assert rehearsal.states == {"environment": "ok", "zero": "failed", "attention": "ok"}
    assert "WORLD_SIZE" in rehearsal.figures["zero"]
    assert rehearsal.code == 1


def test_time_that_is_up_ends_a_part_and_skips_the_others(tmp_path: Path) -> None:
    rehearsal = rehearse(tmp_path, BUDGET="1")
    first = rehearsal.states["environment"]
    assert first in ("timed out", "skipped"), "a loaded machine may take the second to begin"
    assert rehearsal.states == dict.fromkeys(PARTS, "skipped") | {"environment": first}
    assert rehearsal.code == 1


def test_a_part_of_another_name_is_refused_before_any_runs(tmp_path: Path) -> None:
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path), "--rehearse", "zero", "kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "no part is called kernels\n")
    assert list(tmp_path.iterdir()) == []


def found(pattern: str, text: str) -> float:
    """The number that the group of `pattern` stands for."""
    match = re.search(pattern, text)
    assert match is not None, text
    return float(match[1])
