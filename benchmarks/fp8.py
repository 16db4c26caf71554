"""Loss of the quickstart in fp8, emulated, against bf16: the same steps on the same data.

    python benchmarks/fp8.py --data data/quickstart

Needs the extra `fp8`, and the tokenizer and corpus that `make quickstart` builds in --data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUND = 0.01
"""Relative, of the validation loss at the end."""


def train(data: Path, folder: Path, steps: int, matmul: str) -> list[dict[str, float]]:
    """The `train` and `eval` events of a run."""
    words = [f"data.path={data / 'corpus'}", f"data.tokenizer={data / 'tokenizer'}", f"run.dir={folder / matmul}"]
    words += [f"train.steps={steps}", "train.dtype=bf16", f"train.matmul={matmul}", "checkpoint.every=0"]
    command = [sys.executable, "launch/pretrain.py", "--config", "configs/quickstart.yaml", *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / matmul / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def validation(events: list[dict[str, float]], step: int) -> float:
    """The validation loss at `step`."""
    (found,) = (e["loss"] for e in events if (e["event"], e.get("split"), e["step"]) == ("eval", "validation", step))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--steps", type=int, default=500)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = {
            kind: train(asked.data.absolute(), Path(name), asked.steps, kind) for kind in ("dtype", "fp8_emulated")
        }
    losses = {kind: [e["loss"] for e in events if e["event"] == "train"] for kind, events in found.items()}
    ends = {kind: validation(events, asked.steps) for kind, events in found.items()}
    apart = ends["fp8_emulated"] / ends["dtype"] - 1
    farthest = max(abs(fp8 / bf16 - 1) for bf16, fp8 in zip(losses["dtype"], losses["fp8_emulated"], strict=True))
    print(f"validation loss after {asked.steps} steps: bf16 {ends['dtype']:.4f}, fp8 {ends['fp8_emulated']:.4f}")
    print(f"fp8 is {apart:+.2%} from bf16, bound {BOUND:.0%}; the farthest training loss is {farthest:.2%} away")
    sys.exit(abs(apart) > BOUND)


if __name__ == "__main__":
    main()
