"""Seconds of collectives: the measurements that the constants are from, the ways out of a node, what ZeRO sends."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.errors import UserError
from megallama.hardware.gpus import built_in_hardware
from megallama.layout.topology import Topology
from megallama.parallel.issued import Issued
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.plan.memory.state import rank_parameters
from megallama.plan.memory.traffic import Traffic
from megallama.plan.time.communication import (
    Group,
    collective_seconds,
    data_traffic,
    message_seconds,
    ring_bandwidth,
)
from megallama.plan.time.software import known_software
from megallama.train.run import build_model

GIB = 1 << 30
HARDWARE = built_in_hardware()
CONFIG = Path(__file__).parents[2] / "configs" / "debug.yaml"
MICRO_BATCHES = 3


def traffic(kind: str, size: int, times: int = 1) -> Traffic:
    found = Traffic()
    found.add(kind, size, times)
    return found


@pytest.mark.parametrize(
    ("gpu", "ranks", "payload", "bus"),
    [
        ("b200", 32, GIB // 16, 157e9),
        ("b200", 32, GIB, 362e9),
        ("b200", 32, 16 * GIB, 382e9),
        ("h200", 8, GIB // 64, 220e9),
        ("h200", 8, GIB // 16, 347e9),
    ],
)
def test_all_reduces_take_what_was_measured(gpu: str, ranks: int, payload: int, bus: float) -> None:
    """Measured with nccl: stas00/ml-engineering, network/README.md. Rings; a switch that adds up is faster."""
    seconds = 2 * (ranks - 1) / ranks * payload / bus
    found = collective_seconds(HARDWARE[gpu], Group(ranks), traffic("all_reduce", payload))
    assert found == pytest.approx(seconds, rel=0.3)


def test_a_gather_and_a_scatter_are_the_halves_of_an_all_reduce() -> None:
    whole, *halves = (
        collective_seconds(HARDWARE["h100-80g"], Group(8), traffic(kind, GIB, 3))
        for kind in ("all_reduce", "all_gather", "reduce_scatter")
    )
    assert halves == [pytest.approx(whole / 2)] * 2


@pytest.mark.parametrize(
    ("group", "bandwidth"),
    [
        (Group(8), 0.8 * 450e9),
        (Group(16, stride=8), 0.95 * 50e9),
        (Group(16, stride=4), 2 * 0.95 * 50e9),
        (Group(16, stride=16), 0.95 * 50e9),
        (Group(2, stride=4), 0.8 * 450e9),
    ],
)
def test_a_ring_leaves_a_node_by_as_many_cards_as_it_has_ranks_there(group: Group, bandwidth: float) -> None:
    assert ring_bandwidth(HARDWARE["h100-80g"], group) == pytest.approx(bandwidth)


def test_the_slower_of_link_and_cards_is_the_limit() -> None:
    gpu = HARDWARE["h100-80g"].model_copy(update={"node_link_gb_s": 63})
    assert ring_bandwidth(gpu, Group(64)) == pytest.approx(0.8 * 63e9)


def test_one_rank_communicates_nothing_and_asks_for_no_bandwidth() -> None:
    assert collective_seconds(HARDWARE["cpu"], Group(1), traffic("all_reduce", 10**9)) == 0
    with pytest.raises(UserError, match=r"cpu\.gpus_per_node is not known"):
        collective_seconds(HARDWARE["cpu"], Group(2), traffic("all_reduce", 10**9))


def test_messages_to_another_node_take_longer() -> None:
    near, far = (message_seconds(HARDWARE["h100-80g"], stride, 1e8) for stride in (4, 8))
    assert near == pytest.approx(40e-6 + 1e8 / 360e9)
    assert far == pytest.approx(40e-6 + 1e8 / 47.5e9)


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
        planned = data_traffic(config, known_software()["megallama"], rank.total, MICRO_BATCHES).size
        zero, tied = config.zero, config.model.tie_word_embeddings
        name = f"ZeRO-{zero.stage} {config.train.dtype} {zero.bucket_elements} {tied}"
        for kind in {*planned, *sent}:
            size = 2 * rank.total  # norms of gradients and overflow flags are less than a hundredth of the weights
            assert sent[kind] == pytest.approx(planned[kind], rel=0.05, abs=0.01 * size), f"{name} {kind}"


def sent_bytes(launch: Launch, configs: list[RunConfig]) -> list[Counter[str]]:
    device = torch.device("cpu")
    launch.prepare(device)
    mesh = build_mesh(Topology(dp=launch.world_size), launch, device)
    found = []
    for config in configs:
        _, engine = build_model(config, mesh)
        tokens = torch.zeros(1, config.data.sequence_length, dtype=torch.int64)
        batches, scale = [MicroBatch(tokens, tokens)] * MICRO_BATCHES, torch.ones(())
        engine.forward_backward(batches, scale)  # the first step traces ZeRO-3's order and prefetches nothing
        engine.step(1e-4)
        with Issued() as issued:
            engine.forward_backward(batches, scale)
            engine.step(1e-4)
        found.append(issued.size)
    return found


SCHEMES = {
    # Bytes of each parameter in a step of three micro-batches, with fp32 gradients and bf16 weights.
    "megallama ZeRO-1": ("megallama", 1, {"reduce_scatter": 4, "all_gather": 2}),
    "megallama ZeRO-2": ("megallama", 2, {"all_reduce": 12, "all_gather": 2}),
    "sharded optimizer": ("megatron-2024", 1, {"reduce_scatter": 4, "all_gather": 2}),
    "FSDP": ("mosaic-2023", 3, {"reduce_scatter": 12, "all_gather": 12}),
    "FSDP, gradients and state alone": ("mosaic-2023", 2, {"reduce_scatter": 12, "all_gather": 2}),
    "DDP": ("picotron", 1, {"all_reduce": 4}),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_software_sums_gradients_in_its_way(scheme: str) -> None:
    software, stage, each = SCHEMES[scheme]
    config, parameters = run(stage, "bf16", "zero.bucket_elements=1000000"), 10**7
    found = data_traffic(config, known_software()[software], parameters, MICRO_BATCHES)
    assert found.size == {kind: pytest.approx(size * parameters, rel=1e-5) for kind, size in each.items()}
