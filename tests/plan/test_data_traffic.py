"""What crosses data-parallel ranks, against what DeepSpeed really sends in a step."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.plan.memory.dry_run import Issued
from megallama.plan.memory.ranks import rank_parameters
from megallama.plan.time.communication import data_traffic
from megallama.plan.time.workload import workload
from megallama.train.loop import build_model

CONFIG = Path(__file__).parents[2] / "configs" / "debug.yaml"
MICRO_BATCHES = 3


def run(stage: int, dtype: str, *more: str) -> RunConfig:
    """Tables are a third of it; no weight but the norms is so small that ZeRO-3 keeps it whole."""
    model = "hidden_size=384 intermediate_size=1024 num_hidden_layers=3 num_attention_heads=4 num_key_value_heads=4"
    words = [f"model.{word}" for word in model.split()]
    batch = ["train.micro_batch_size=1", f"train.global_batch_size={2 * MICRO_BATCHES}", "data.sequence_length=8"]
    zero = [f"zero.stage={stage}", "zero.bucket_elements=1000", "model.vocab_size=4000"]
    return load_config(CONFIG, [*words, *batch, *zero, f"train.dtype={dtype}", "train.device=cpu", *more])


RUNS = [run(stage, dtype) for stage, dtype in product((1, 2, 3), ("bf16", "fp32"))] + [
    run(3, "bf16", "model.tie_word_embeddings=true"),
    run(3, "bf16", "zero.bucket_elements=1500000"),
    run(3, "bf16", "zero.bucket_elements=100000000"),
]


def test_a_step_sends_what_the_plan_says() -> None:
    for config, sent in zip(RUNS, run_ranks(sent_bytes, 2, RUNS)[0], strict=True):
        (rank,) = rank_parameters(config)
        planned = data_traffic(workload(config, 2), rank.total)
        zero, tied = config.zero, config.model.tie_word_embeddings
        name = f"ZeRO-{zero.stage} {config.train.dtype} {zero.bucket_elements} {tied}"
        for kind in {*planned, *sent}:
            size = 2 * rank.total  # norms of gradients and overflow flags are less than a hundredth of the weights
            assert sent[kind] == pytest.approx(planned.get(kind, 0), rel=0.05, abs=0.01 * size), f"{name} {kind}"


def sent_bytes(launch: Launch, configs: list[RunConfig]) -> list[Counter[str]]:
    device = torch.device("cpu")
    launch.prepare(device)
    mesh = build_mesh(Topology(dp=launch.world_size), launch, device)
    found = []
    for config in configs:
        _, engine = build_model(config, mesh, MICRO_BATCHES)
        tokens = torch.zeros(1, config.data.sequence_length, dtype=torch.int64)
        batches, scale = [(tokens, tokens)] * MICRO_BATCHES, torch.ones(())
        engine.forward_backward(batches, scale)  # the first step traces ZeRO-3's order and prefetches nothing
        engine.step(1e-4)
        with Issued() as issued:
            engine.forward_backward(batches, scale)
            engine.step(1e-4)
        found.append(issued.size)
    return found
