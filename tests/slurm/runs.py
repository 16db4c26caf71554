"""The 7B recipe as a run of half a minute, and what tests ask of it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.faults.runs import losses_by_step
from tests.slurm.cluster import Cluster

STEPS = 60


def small(dataset: str, run_dir: Path, *more: str) -> list[str]:
    """configs/7b.yaml at tp 2 without a pipeline, the model shrunk, on a CPU: 60 steps of a sixth of a second."""
    return [
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
        "train.device=cpu",
        f"train.steps={STEPS}",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        "schedule.warmup_steps=1",
        "evaluation.samples=2",
        "evaluation.every=0",
        "checkpoint.every=30",
        f"data.path={dataset}",
        f"run.dir={run_dir}",
        *more,
    ]


def steps_done(run_dir: Path) -> int:
    """The last step of which metrics tell."""
    try:
        return max(losses_by_step(run_dir), default=0)
    except (OSError, json.JSONDecodeError):
        return 0


def wait_for_steps(cluster: Cluster, run_dir: Path, count: int, timeout: float = 90.0) -> None:
    """Until so many steps more are done than now."""
    before = steps_done(run_dir)
    cluster.wait(lambda: steps_done(run_dir) >= before + count, timeout)


def log(run_dir: Path, job: str, restart: int, what: str) -> str:
    """A log of one start of a job, as `rank0`."""
    return (run_dir / "logs" / f"{job}-{restart}-{what}.log").read_text()
