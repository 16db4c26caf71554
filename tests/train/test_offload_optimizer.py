"""`zero.offload_optimizer: cpu` changes where the optimizer is and nothing that it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megallama.verify.compare import read_tensors
from tests.launching import arguments, losses, pretrain

HOST, STAGED = "zero.offload_optimizer=cpu", "model.num_hidden_layers=4"
FOUR = ["train.steps=4", "train.micro_batch_size=1", "train.global_batch_size=4", "optimizer.clip=0.1"]


def last(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run_dir / "checkpoints" / "step_00000004")


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, ["train.dtype=fp32"], id="fp32"),
        pytest.param(2, ["train.dtype=fp32"], id="dp2-fp32", marks=pytest.mark.layouts),
        pytest.param(1, ["train.dtype=bf16"], id="bf16", marks=pytest.mark.layouts),
        pytest.param(2, ["train.dtype=bf16"], id="dp2-bf16"),
        pytest.param(2, ["train.dtype=bf16", "parallel.tensor=2"], id="tp2-bf16", marks=pytest.mark.layouts),
        pytest.param(
            2, ["train.dtype=bf16", "parallel.pipeline=2", "parallel.schedule=dualpipev", STAGED], id="pp2-dualpipev"
        ),
    ],
)
def test_losses_weights_and_moments_are_those_of_the_device_to_the_bit(
    ranks: int, layout: list[str], byte_dataset: str, tmp_path: Path
) -> None:
    """Also where a run moves from one to the other at step 2, and back at step 3."""
    words = [*FOUR, *layout]
    for name, starts in {
        "device": [[]],
        "host": [[HOST]],
        "moved": [["train.stop_after=2"], [HOST, "train.stop_after=3"], []],
    }.items():
        for more in starts:
            assert pretrain(ranks, arguments(byte_dataset, tmp_path / name, *words, *more)) == [(0, "")] * ranks
    expected = last(tmp_path / "device")
    for name in ("host", "moved"):
        assert losses(tmp_path / name) == losses(tmp_path / "device"), name
        found = last(tmp_path / name)
        assert found.keys() == expected.keys()
        assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == [], name
