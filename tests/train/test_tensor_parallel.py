"""What tensor-parallel ranks send in a step, whatever the schedule: no collective more than the minimum."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.layout.stages import stages
from megallama.layout.topology import Topology
from megallama.parallel.issued import Issued
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import Axis, build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.plan.memory.traffic import Traffic, stage_traffic, step_traffic

BATCH, LENGTH, MICRO_BATCHES, LAYERS = 2, 32, 4, 4
PP2 = ["parallel.pipeline=2"]
SPLIT = "parallel.schedule=zbvzerobubble"
LAYOUTS = {
    "bf16": [],
    "fp32-qk-norm": ["train.dtype=fp32", "model.qk_norm=true"],
    "selective": ["train.recompute=selective"],
    "full": ["train.recompute=full"],
    "zero2": ["zero.stage=2"],
    "nosp-qk-norm": ["parallel.sequence=false", "model.qk_norm=true"],
    "1f1b": [*PP2, "parallel.schedule=1f1b"],
    "interleaved1f1b": [*PP2, "parallel.schedule=interleaved1f1b"],
    "dualpipev": [*PP2, "parallel.schedule=dualpipev"],
    "zbvzerobubble": [*PP2, SPLIT, "model.qk_norm=true"],
    "zbvzerobubble-fp32-nosp": [*PP2, SPLIT, "train.dtype=fp32", "parallel.sequence=false"],
}


def run(*overrides: str) -> RunConfig:
    words = [f"model.num_hidden_layers={LAYERS}", f"data.sequence_length={LENGTH}", f"train.micro_batch_size={BATCH}"]
    words += [f"train.global_batch_size={BATCH * MICRO_BATCHES}", "train.device=cpu", "train.dtype=bf16"]
    return load_config("configs/debug.yaml", [*words, "parallel.tensor=2", *overrides])


@dataclass(frozen=True)
class Sent:
    """By one rank, of collectives by kind: number and bytes in forward and backward, and of what sums norms' shares."""

    number: Counter[str]
    size: Counter[str]
    once: tuple[Counter[str], Counter[str]]


def sent(launch: Launch, config: RunConfig) -> Sent:
    launch.prepare(torch.device("cpu"))
    import megallama.train.zero
    from megallama.train.run import build_model, draw_weights
    from megallama.train.shares import sum_shares

    def counted(gradients: list[Tensor], tp: Axis) -> None:
        with once:
            sum_shares(gradients, tp)

    mesh = build_mesh(Topology(dp=1, **config.parallel.sizes), launch, torch.device("cpu"))
    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine)
    tokens = torch.randint(257, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    scale: Tensor = torch.ones(()) / (BATCH * LENGTH * MICRO_BATCHES)
    once, megallama.train.zero.sum_shares = Issued(), counted
    with Issued() as passes:
        engine.forward_backward([MicroBatch(tokens, tokens)] * MICRO_BATCHES, scale)
    engine.step(0.0)
    return Sent(passes.number, passes.size, (once.number, once.size))


def planned(config: RunConfig, rank: int) -> tuple[Traffic, Traffic]:
    """In the passes of a step, and once per step."""
    every = stages(config)
    mine = [stage for stage in every if stage.rank == rank // 2]
    backwards = 2 if config.parallel.schedule == "zbvzerobubble" else 1
    passes = sum((stage_traffic(config, stage, len(every), backwards) for stage in mine), Traffic())
    return passes, step_traffic(config, mine, len(every))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_what_the_plan_says(layout: str) -> None:
    config = run(*LAYOUTS[layout])
    found = run_ranks(sent, 2 * config.parallel.pipeline, config)
    for rank, each in enumerate(found):
        passes, once = planned(config, rank)
        number, size = (Counter({k: MICRO_BATCHES * n for k, n in of.items()}) for of in (passes.number, passes.size))
        if config.zero.stage == 2:  # it sums gradients in backward
            number["all_reduce"] += MICRO_BATCHES
            size["all_reduce"] = each.size["all_reduce"]
        assert (each.number, each.size, each.once) == (number, size, (once.number, once.size))


@pytest.mark.parametrize("layout", ["bf16", "dualpipev", "zbvzerobubble"])
def test_a_layer_sends_four_times_and_four_times_back_and_gathers_two_inputs_again(layout: str) -> None:
    """Beside them the embedding once and the head once, each way, and the loss's maximum and sums."""
    config = run(*LAYOUTS[layout])
    total = Counter[str]()
    for each in run_ranks(sent, 2 * config.parallel.pipeline, config)[::2]:
        total += each.number
    layers, ends = MICRO_BATCHES * LAYERS, MICRO_BATCHES * 2
    assert total == {"all_gather": 6 * layers + ends, "reduce_scatter": 4 * layers + ends, "all_reduce": ends}
