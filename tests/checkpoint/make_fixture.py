"""How tests/checkpoint/fixtures/format-N was made: once, by `python -m tests.checkpoint.make_fixture FOLDER`.

A fixture is never made again: it stands for what users have on their disks. A new format gets a folder of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from megallama.checkpoint.tensors import Array, Stored
from megallama.config.schema import RunConfig
from megallama.corpus.building.build import build_dataset
from megallama.layout.names import parse_layout
from megallama.parallel.spawn import run_ranks
from megallama.verify.compare import train_losses
from megallama.verify.verify import train_rank

TEXT = "text.jsonl"
EXPECTED = "expected.json"
SAVED_AFTER = 3
MODEL = {
    "vocab_size": 257,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def tiny_run(run_dir: Path, dataset: str, model: dict[str, Any], layout: str, stop_after: int) -> RunConfig:
    """Four steps of 5,896 parameters, of which `stop_after` are done, saved at the end."""
    spread = parse_layout(layout)
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "model": model,
        "data": {"path": dataset, "sequence_length": 16, "validation_fraction": 0.2},
        "zero": {},
        "train": {
            "steps": 4,
            "stop_after": stop_after,
            "global_batch_size": 4,
            "batch_ramp": [],
            "dtype": "fp32",
            "device": "cpu",
            "seed": 1,
        },
        "optimizer": {"lr": 1e-2},
        "evaluation": {"samples": 4},
        "checkpoint": {"resume": "auto"},
    }
    spread.apply(tree)
    return RunConfig.model_validate(tree)


def build_text(text: Path, folder: Path) -> str:
    """The dataset that the fixture's run read, made again from its text; its prefix."""
    build_dataset([str(text)], str(folder / "data"), "bytes", workers=1)
    return str(folder / "data")


def sha256(tensor: Array) -> str:
    """Of the numbers of a tensor in row-major order, each as 4 bytes, little-endian."""
    return hashlib.sha256(tensor.astype("<f4").tobytes()).hexdigest()


def main(folder: Path) -> None:
    """Train at tp 2 x dp 2, and keep the checkpoint, its text, its tensors' hashes and the loss of the step after."""
    lines = [json.dumps({"text": f"Document {n} tells that {n} times {n} is {n * n}."}) for n in range(30)]
    folder.mkdir(parents=True)
    (folder / TEXT).write_text("\n".join(lines) + "\n")
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        dataset = build_text(folder / TEXT, Path(name))
        for last in (SAVED_AFTER, SAVED_AFTER + 1):
            run_ranks(train_rank, 4, tiny_run(run, dataset, MODEL, "tp2-dp2", last), None)
        checkpoint = f"step_{SAVED_AFTER:08d}"
        stored = Stored(shutil.copytree(run / "checkpoints" / checkpoint, folder / checkpoint))
        hashes = {tensor: sha256(stored.read(tensor)) for tensor in stored.shapes}
        expected = {"next_loss": train_losses(run)[-1], "tensors": hashes}
        (folder / EXPECTED).write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
