"""The sbatch scripts, with stand-ins for Slurm's commands; the real Slurm is exercised elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.data.build import build_dataset

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))

# Jobs of other tests on this machine take other ports.
JOB = str(os.getpid())

# Runs the command that it is given once per node, all nodes on this machine and at the same time.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  case $1 in --output=*) output=${1#--output=} ;; esac
  shift
done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" >>"${output/\\%n/$node}" 2>&1 &
  tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""

# Every node is this machine.
SCONTROL = """#!/usr/bin/env bash
if [[ $2 == hostnames ]]; then
  tr , '\\n' <<<"$3"
else
  echo "NodeName=$3 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=$3"
fi
"""

SMALL = [
    "model.vocab_size=257",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "data.tokenizer=bytes",
    "data.sequence_length=32",
    "data.validation_fraction=0.2",
    "parallel.pipeline=1",
    "parallel.tensor=2",
    "train.device=cpu",
    "train.steps=2",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "schedule.warmup_steps=1",
    "evaluation.samples=2",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_legal_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name != "run.sh"], ids=lambda script: script.name)
def test_scripts_are_thin(script: Path) -> None:
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[-1].startswith(f'exec bash "$folder/run.sh" configs/{script.stem}.yaml')
    assert len(lines) == 3


def test_sbatch_script_trains_over_two_nodes(tmp_path: Path) -> None:
    result = _submit(tmp_path, "7b.sh", [*SMALL, f"data.path={_dataset(tmp_path)}", f"run.dir={tmp_path / 'run'}"])
    logs = {path.name: path.read_text() for path in sorted((tmp_path / "run" / "logs").iterdir())}
    assert result.returncode == 0, (result.stderr, logs)
    assert list(logs) == [f"{JOB}-0-node0.log", f"{JOB}-0-node1.log"]
    assert "step 2  done" in logs[f"{JOB}-0-node0.log"], "rank 0 is on the first node"
    assert "step 2  done" not in logs[f"{JOB}-0-node1.log"]
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert facts["topology"] == {"pp": 1, "dp": 1, "cp": 1, "tp": 2}


def test_a_mistake_in_the_configuration_ends_the_job_before_any_node_is_used(tmp_path: Path) -> None:
    result = _submit(tmp_path, "7b.sh", [*SMALL, "parallel.tensor=3", f"run.dir={tmp_path / 'run'}"])
    assert result.returncode == 2
    assert "megallama: parallel.tensor=3 does not divide" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_failing_run_fails_the_job_and_says_where_to_look(tmp_path: Path) -> None:
    _write_commands(tmp_path, srun="#!/usr/bin/env bash\nexit 143\n")
    result = _submit(tmp_path, "7b.sh", [*SMALL, f"run.dir={tmp_path / 'run'}"], write=False)
    assert result.returncode == 143
    assert f"{tmp_path}/run/logs/{JOB}-0-node" in result.stderr


def test_scripts_run_from_a_copy_elsewhere_as_sbatch_does_it(tmp_path: Path) -> None:
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    copy.write_text((ROOT / "slurm" / "7b.sh").read_text())
    _write_commands(tmp_path, srun='#!/usr/bin/env bash\necho "srun in $PWD"\n')
    result = _submit(tmp_path, copy, [*SMALL, f"run.dir={tmp_path / 'run'}"], write=False)
    assert result.returncode == 0, result.stderr
    assert f"srun in {ROOT}" in result.stdout


def _submit(
    folder: Path, script: str | Path, overrides: list[str], *, write: bool = True
) -> subprocess.CompletedProcess[str]:
    """What `sbatch SCRIPT OVERRIDES` would run on the first of two nodes with one rank each."""
    if write:
        _write_commands(folder)
    path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    slurm = {
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n1,n2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MEGALLAMA_NPROC_PER_NODE": "1",
    }
    return subprocess.run(
        ["bash", ROOT / "slurm" / script, *overrides],
        env={**os.environ, **slurm, "PATH": os.pathsep.join(path)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def _write_commands(folder: Path, srun: str = SRUN) -> None:
    (folder / "bin").mkdir()
    for name, content in (("srun", srun), ("scontrol", SCONTROL)):
        command = folder / "bin" / name
        command.write_text(content)
        command.chmod(0o755)


def _dataset(folder: Path) -> str:
    lines = [json.dumps({"text": f"document {number} " * 20}) for number in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    build_dataset([str(folder / "text.jsonl")], str(folder / "corpus"), "bytes", workers=1)
    return str(folder / "corpus")
