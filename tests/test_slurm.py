"""The files of slurm/ where there is no Slurm; tests/slurm has one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megallama.cluster.job_file import Allocation, job_file, log_of
from megallama.config.load import load_config
from megallama.errors import UserError
from tests.launching import BIN

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
SIZES = [script for script in SCRIPTS if script.stem not in ("run", "environment")]

# A stand-in: neither Apptainer nor Pyxis is to be had where these tests run. Prints the words that reach srun.
SRUN = """#!/usr/bin/env bash
printf '%s ' srun "$@" >>"$SAID"
echo >>"$SAID"
while [[ $1 == --* ]]; do shift; done
if [[ $* == *cluster.job* ]]; then exec "$@"; fi
if [[ $* == *cluster.preflight* ]]; then exit 0; fi
"""
APPTAINER = """#!/usr/bin/env bash
while [[ $1 != python ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $2 == hostnames ]]; then tr , '\n' <<<"$3"; else echo "NodeName=$3 NodeAddr=10.0.0.1 NodeHostName=$3"; fi
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_legal_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", SIZES, ids=lambda script: script.name)
def test_scripts_are_thin(script: Path) -> None:
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[-1].startswith(f'exec bash "$folder/run.sh" configs/{script.stem}.yaml')
    assert len(lines) == 3


@pytest.mark.parametrize("script", SIZES, ids=lambda script: script.name)
def test_a_written_job_file_asks_for_what_the_shipped_one_asks(script: Path, tmp_path: Path) -> None:
    asked = dict(_options(script.read_text()))
    allocation = Allocation(int(asked["--nodes"]), 8, True, asked["--time"], int(asked["--signal"].partition("@")[2]))
    run_dir = tmp_path / script.stem
    written = dict(_options(job_file(Path(f"configs/{script.stem}.yaml"), [], run_dir, "%x-%j.log", allocation)))
    assert written == asked


HOSTILE = [
    *("x y", "x'y", 'x"y', "x$(touch PWNED)", "x`touch PWNED`", "x;touch PWNED", "x&&touch PWNED", "x|touch PWNED"),
    *("x\\", "-x", "--wrap=touch PWNED", "x*", "~", "$HOME", "#x", "%j", "x #y", "é", "x" * 200),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_job_file_runs_nothing_that_a_name_says(name: str, tmp_path: Path) -> None:
    """Its words reach run.sh as they are, and every other line is a comment; or the name is refused."""
    checkout = tmp_path / "checkout"
    (checkout / "slurm").mkdir(parents=True)
    (checkout / "slurm" / "run.sh").write_text('printf "%s\\0" "$@" > words\n')
    allocation = Allocation(1, 1, False, "1:00:00", 60, [f"--comment={name}"])
    words = [f"run.dir={name}", name]
    run_dir = Path("/runs") / name
    if "'" in name or "\\" in name:
        with pytest.raises(UserError, match="which no line of a job file can carry"):
            job_file(Path(name), words, run_dir, log_of(run_dir), allocation)
        return
    text = job_file(Path(name), words, run_dir, log_of(run_dir), allocation)
    (tmp_path / "job.sh").write_text(text)
    subprocess.run(
        ["bash", tmp_path / "job.sh"], cwd=tmp_path, env={"SLURM_SUBMIT_DIR": str(checkout), **os.environ}, check=True
    )
    first, *others = (tmp_path / "words").read_text().split("\0")
    assert first in (name, f"./{name}")
    assert not first.startswith("-")
    assert others == [*words, ""]
    assert not list(tmp_path.rglob("PWNED"))
    code = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line.split()[0] for line in code] == ["export", "exec"]
    assert f"{name.replace('%', '%%')}/logs/job-%j.log" in text


@pytest.mark.parametrize("char", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028", "\u202e"])
def test_what_would_end_a_line_of_a_job_file_is_in_no_name_and_no_option(char: str, tmp_path: Path) -> None:
    hostile = f"runs/x{char}touch PWNED{char}"
    with pytest.raises(UserError, match="line ends, control characters") as refused:
        load_config(ROOT / "configs" / "debug.yaml", [f"run.dir={json.dumps(hostile)}"])
    assert str(refused.value).isprintable()
    allocation = Allocation(1, 1, False, "1:00:00", 60, [f"--comment=x{char}touch PWNED"])
    with pytest.raises(UserError, match="which no line of a job file can carry") as refused:
        job_file(Path("c.yaml"), [], Path("/runs/x"), "%x.log", allocation)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "name", ["x" * 256, "é" * 128, f"{'x' * 200}/" * 5], ids=["a component", "of two bytes each", "a path"]
)
def test_a_name_that_linux_has_no_room_for_is_refused_before_anything_is_looked_at(name: str) -> None:
    for key in ("run.dir", "data.path", "data.tokenizer", "checkpoint.init_from"):
        with pytest.raises(UserError, match="names of at most 255 bytes, 1000 in a path"):
            load_config(ROOT / "configs" / "debug.yaml", [f"{key}={name}"])


def test_without_slurm_there_is_one_sentence(tmp_path: Path) -> None:
    found = _bash(tmp_path, ROOT / "slurm" / "7b.sh", PATH=os.environ["PATH"])
    assert found.returncode == 2
    assert found.stderr == "megallama: not inside a Slurm job; submit it: sbatch slurm/7b.sh\n"
    launched = subprocess.run(
        [BIN / "megallama", "launch", "configs/7b.yaml", f"run.dir={tmp_path / 'run'}"],
        cwd=ROOT,
        env={"PATH": "/usr/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert launched.returncode == 2
    assert launched.stderr.startswith("megallama: squeue is not on PATH: this machine has no Slurm; go to a login node")
    assert not (tmp_path / "run").exists()


def test_a_missing_environment_is_one_sentence(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "checkout" / "slurm")
    _stand_in(tmp_path, scontrol=SCONTROL)
    found = _bash(tmp_path, tmp_path / "checkout" / "slurm" / "7b.sh", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin", **JOB)
    assert found.returncode == 2
    (sentence,) = found.stderr.splitlines()
    assert "does not know megallama; make " in sentence
    assert str(tmp_path / "checkout" / ".venv") in sentence


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("image.sif", "apptainer exec --nv --bind {root},/data --pwd {root} image.sif "),
        (
            "lab/image:1",
            "--container-image=lab/image:1 --container-mounts={root}:{root},/data:/data --container-workdir",
        ),
    ],
)
def test_a_container_is_around_every_command_on_the_nodes(image: str, words: str, tmp_path: Path) -> None:
    _stand_in(tmp_path, srun=SRUN, apptainer=APPTAINER, scontrol=SCONTROL)
    path = f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}"
    said = tmp_path / "said"
    container = {"CONTAINER": image, "CONTAINER_MOUNTS": "/data", "SAID": str(said), "PATH": path}
    for look in ("yes", "no"):
        words_of_run = [*SMALL, f"run.dir={tmp_path / 'run'}"]
        _bash(tmp_path, ROOT / "slurm" / "7b.sh", *words_of_run, MEGALLAMA_PREFLIGHT=look, **JOB, **container)
    calls = said.read_text().splitlines()
    for what in ("torchrun", "megallama.cluster.preflight"):
        assert any(what in call for call in calls)
    for call in calls:
        assert words.format(root=ROOT) in call


JOB = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_JOB_NUM_NODES": "16",
    "SLURM_JOB_NODELIST": "n1,n2",
    "SLURM_GPUS_ON_NODE": "8",
}
SMALL = ["train.device=cpu", "model.hidden_size=256", "model.intermediate_size=256"]


def _options(text: str) -> list[tuple[str, str]]:
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def _bash(folder: Path, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """As a user without Slurm's own variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | variables
    return subprocess.run(["bash", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def _stand_in(folder: Path, **commands: str) -> None:
    (folder / "bin").mkdir()
    for name, content in commands.items():
        command = folder / "bin" / name
        command.write_text(content)
        command.chmod(0o755)
