"""The files of slurm/ where there is no Slurm; tests/slurm has one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from slurm.generate import RECIPES, text_of
from tests.launching import BIN

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))

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


@pytest.mark.parametrize("name", RECIPES)
def test_the_files_of_the_recipes_are_those_that_their_generator_makes(name: str) -> None:
    assert (ROOT / "slurm" / f"{name}.sh").read_text() == text_of(name), "python slurm/generate.py writes it anew"


def test_without_slurm_there_is_one_sentence(tmp_path: Path) -> None:
    found = _bash(tmp_path, ROOT / "slurm" / "7b.sh", PATH=os.environ["PATH"])
    assert found.returncode == 2
    assert found.stderr == "megallama: not inside a Slurm job; submit it: sbatch slurm/7b.sh\n"
    launched = subprocess.run(
        [BIN / "megallama", "launch", "configs/debug.yaml", "--per-node=1", f"run.dir={tmp_path / 'run'}"],
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


def test_names_reach_the_nodes_as_they_are(tmp_path: Path) -> None:
    """A config that begins as an option does, a run directory that srun would take for a pattern."""
    checkout, run_dir = tmp_path / "checkout", tmp_path / "%j 'a' $(touch PWNED)"
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    shutil.copy(ROOT / "configs" / "debug.yaml", checkout / "-c.yaml")
    _stand_in(tmp_path, srun=SRUN, scontrol=SCONTROL)
    variables = {**JOB, "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NUM_NODES": "2", "SAID": str(tmp_path / "said")}
    path = f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}"
    found = _bash(checkout, checkout / "slurm" / "run.sh", "-c.yaml", f"run.dir={run_dir}", PATH=path, **variables)
    assert "megallama: " not in found.stderr
    preflight = (tmp_path / "said").read_text().splitlines()[0]
    assert f"--output={tmp_path}/%%j 'a' $(touch PWNED)/logs/{os.getpid()}-0-preflight.log" in preflight
    assert preflight.endswith(f"n1,n2 ./-c.yaml run.dir={run_dir} ")
    assert sorted(path.name for path in checkout.iterdir()) == ["-c.yaml", "slurm"]


JOB = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_JOB_NUM_NODES": "16",
    "SLURM_JOB_NODELIST": "n1,n2",
    "SLURM_GPUS_ON_NODE": "8",
}
SMALL = ["train.device=cpu", "model.hidden_size=256", "model.intermediate_size=256"]


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
