"""Runs as training writes them: metrics.jsonl by its writer, line by line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megallama.run_dir.events import METRICS, Event, JsonLines

BEGUN = 1_700_000_000.0
SECONDS = 0.5
"""A step."""
TOKENS = 1024
GIB = 2**30
PARTS = {
    "data": 0.004,
    "forward": 0.11,
    "backward": 0.2,
    "tensor": 0.06,
    "context": 0.0,
    "pipeline": 0.035,
    "data_parallel": 0.022,
    "optimizer": 0.015,
    "other": 0.009,
}
"""Seconds of a step; the run has no context parallelism."""


class Writer:
    """A run as its starts write it; `now` is the clock, None for files of before events had times."""

    def __init__(self, folder: Path, total: int, *, timed: bool = True) -> None:
        folder.mkdir(parents=True)
        self._lines, self._total, self._timed, self.now = JsonLines(folder / METRICS), total, timed, BEGUN

    def write(self, event: str, **values: Any) -> None:
        self._lines.write({"event": event, **values, **({"time": round(self.now, 3)} if self._timed else {})})

    def start(self, step: int, restarts: int) -> None:
        if restarts:
            self.write("resume", step=step, samples=8 * step, path=f"checkpoints/step_{step:08d}")
        facts = {"ranks": 2, "parameters": 2_361_024, "layout": "dp2", "tokens_per_step": TOKENS, "device": "cpu"}
        self.write("start", step=step, restarts=restarts, predicted_memory_bytes=3 * GIB, **facts)

    def train(self, step: int, **other: Any) -> None:
        self.now += SECONDS
        self.write("train", **(train_event(step, self._total) | other))

    def evaluate(self, step: int, *splits: str) -> None:
        for nth, split in enumerate(splits, 1):
            loss = 8.4 * math.exp(-step / 4000) + 0.6 * nth
            self.write("eval", step=step, split=split, loss=loss, perplexity=math.exp(loss))

    def checkpoint(self, step: int) -> None:
        self.write("checkpoint", step=step, path=f"step_{step:08d}", bytes=1, seconds=1.0, blocked_seconds=0.1)

    def close(self) -> None:
        self._lines.close()


def train_event(step: int, total: int) -> Event:
    """The fields of a train event, with numbers that no other step has."""
    wave = math.sin(step * 12.9898) * 43758.5453
    noise = wave - math.floor(wave)
    return {
        "step": step,
        "total_steps": total,
        "tokens": step * TOKENS,
        "samples": step * 8,
        "global_batch_size": 8,
        "loss": 8.3 * math.exp(-step / 4000) + 0.3 * noise,
        "grad_norm": 0.5 + noise,
        "lr": 2e-3 * min(1.0, step / 100) * (1 - 0.9 * step / (total + 1)),
        "seconds": SECONDS,
        "seconds_left": (total - step) * SECONDS,
        "tokens_per_second": 2000 + 100 * noise,
        "mfu": 0.4 + 0.02 * noise,
        "mfu_causal": 0.37 + 0.02 * noise,
        "peak_memory_bytes": int(2 * GIB + step * 1000),
        "breakdown": {name: seconds * (1 + 0.02 * noise) for name, seconds in PARTS.items()},
        "slowest": [[3 if step % 4 else 1, 0.9 * SECONDS], [0, 0.8 * SECONDS]],
    }


def long_run(folder: Path, steps: int = 10_000) -> Path:
    """A run of `steps` steps with three restarts, a rollback, a rewind, two skips, two stragglers and a failed save.

    Each restart repeats a hundredth of the steps, and comes an hour after the start before it ended.
    """
    run = Writer(folder, steps)
    run.start(0, 0)
    run.evaluate(0, "train", "validation", "web")
    step, restarts, unit = 0, 0, steps // 100
    fails = {26 * unit: 25 * unit, 51 * unit: 50 * unit, 76 * unit: 75 * unit}
    while step < steps:
        step += 1
        skipped = step in (30 * unit, 30 * unit + 1)
        if skipped:
            run.write("skip", step=step, samples=8 * step, reason="gradient")
        run.train(step, **({"grad_norm": None} if skipped else {}))
        if step == 40 * unit:
            for rank in (3, 1):
                run.write("straggler", step=step, rank=rank, host="node7", seconds=0.12 + rank / 100, share=0.25)
        if step % (5 * unit) == 0:
            run.evaluate(step, "train", "validation", "web")
            run.checkpoint(step)
        if step == 12 * unit:
            run.write("checkpoint_failed", step=step, reason="no space", failures=1, seconds=1.0, blocked_seconds=0.0)
        if step in fails:
            restarts += 1
            run.now += 3600
            step = fails.pop(step)
            if restarts == 2:
                run.write("rollback", step=step, path=f"checkpoints/step_{step:08d}", set_aside={})
            run.start(step, restarts)
        if step == 80 * unit:
            run.write("rewind", step=step, passed_over=[8 * step, 8 * step + 16])
    run.write("stop", step=steps, status="done", reason="done")
    run.close()
    return folder


def plain_run(folder: Path, steps: int = 20, splits: Sequence[str] = ("validation",), *, timed: bool = True) -> Path:
    """A run that nothing happens to: a train event for each step, an evaluation at both ends, one save."""
    run = Writer(folder, steps, timed=timed)
    run.evaluate(0, *splits)
    for step in range(1, steps + 1):
        run.train(step)
    run.evaluate(steps, *splits)
    run.checkpoint(steps)
    run.close()
    return folder
