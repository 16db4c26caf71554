"""What is loaded into an engine that has trained, as when a run goes back, is what it computes with from then on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megallama.config.schema import RunConfig
from megallama.data.loader import open_data
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks
from tests.train.test_gradients import config

STAGES = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(("stage", "dtype"), STAGES)
def test_masters_that_were_overwritten_are_the_weights(stage: int, dtype: str, byte_dataset: str) -> None:
    run = config(byte_dataset, f"zero.stage={stage}", f"train.dtype={dtype}")
    for before, between, after in run_ranks(go_back, 2, run):
        assert between < before
        assert after == before


def go_back(launch: Launch, config: RunConfig) -> tuple[float, float, float]:
    """The loss before a step, after it, and with the weights of before it again."""
    device = torch.device("cpu")
    launch.prepare(device)
    from megallama.train.evaluate import evaluate
    from megallama.train.loop import train_step
    from megallama.train.run import build_model, draw_weights

    mesh = build_mesh(Topology(dp=2), launch, device)
    data = open_data(config, mesh.topology, launch.rank)
    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine)
    losses = [evaluate(engine, data.train, 4, mesh)]
    masters = [fragment.master.clone() for fragment in engine.fragments()]
    run: Any = SimpleNamespace(mesh=mesh, engine=engine, spikes=None)
    train_step(run, data.train.step(0), 1e-2)
    losses.append(evaluate(engine, data.train, 4, mesh))
    for fragment, master in zip(engine.fragments(), masters, strict=True):
        fragment.master.copy_(master)
    engine.state_was_loaded(0)
    return losses[0], losses[1], evaluate(engine, data.train, 4, mesh)
