"""What training builds is what the settings ask for: seen in shapes, in bytes and in DeepSpeed's engine."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.train.run import build_model, draw_weights
from tests.model.test_recompute import bytes_kept_for_backward

SEQUENCE = 64


@dataclass(frozen=True)
class Seen:
    """One rank's forward pass: positions in the output of each layer, bytes kept for backward; and its optimizer."""

    positions: list[int]
    kept: int
    zero_stage: int


def look(launch: Launch, config: RunConfig) -> Seen:
    device, tp = torch.device("cpu"), config.parallel.tensor
    launch.prepare(device)
    mesh = build_mesh(Topology(dp=launch.world_size // tp, tp=tp), launch, device)
    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine)
    positions: list[int] = []

    def record(layer: nn.Module, inputs: object, hidden: Tensor) -> None:
        positions.append(hidden.shape[0])

    for layer in model.decoder_layers():
        layer.register_forward_hook(record)
    tokens = torch.randint(257, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    _, kept = bytes_kept_for_backward(model, lambda: model(tokens[:, :-1], tokens[:, 1:]))
    return Seen(positions, kept, engine._engine.zero_optimization_stage())


def looks(world_size: int, *overrides: str) -> list[Seen]:
    return run_ranks(look, world_size, load_config("configs/debug.yaml", overrides))


def test_sequence_parallelism_cuts_what_passes_between_layers() -> None:
    by_default, on, off = (
        looks(2, "parallel.tensor=2", f"parallel.sequence={value}") for value in ("null", "true", "false")
    )
    assert [seen.positions for seen in on] == [[SEQUENCE // 2] * 2] * 2
    assert [seen.positions for seen in off] == [[SEQUENCE] * 2] * 2
    assert max(seen.kept for seen in on) < min(seen.kept for seen in off)
    assert by_default == on


def test_recomputation_cuts_what_is_kept() -> None:
    none, selective, full = (looks(1, f"train.recompute={mode}")[0].kept for mode in ("none", "selective", "full"))
    assert none > selective > full


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_runs_at_its_stage(stage: int) -> None:
    assert [seen.zero_stage for seen in looks(2, f"zero.stage={stage}")] == [stage] * 2
