"""State memory of the ledger against the bytes that engine and optimizer really hold, tensor by tensor."""

from __future__ import annotations

import gc
from itertools import product
from pathlib import Path

import pytest
import torch

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.plan.memory.ledger import held_rows, host_rows
from megallama.plan.memory.state import rank_parameters
from megallama.train.run import build_model

CONFIG = Path(__file__).parents[2] / "configs" / "debug.yaml"
BUCKET = 1000


def run(*more: str) -> RunConfig:
    """20.4 million parameters, 48,384 of which fill up the vocabulary."""
    model = "vocab_size=8001 hidden_size=384 intermediate_size=1024 num_hidden_layers=8 num_attention_heads=6"
    words = [f"model.{word}" for word in model.split()] + ["model.num_key_value_heads=6"]
    size = ["data.sequence_length=8", "train.micro_batch_size=1", "train.global_batch_size=4", "train.device=cpu"]
    return load_config(CONFIG, [*words, *size, f"zero.bucket_elements={BUCKET}", *more])


FREEZE = 'train.freeze=[model.embed_tokens.weight, "model.layers.[1-5].*"]'
RUNS = [run(f"zero.stage={stage}", f"train.dtype={dtype}") for stage, dtype in product((1, 2, 3), ("bf16", "fp32"))]
FROZEN = [run(FREEZE, "train.dtype=bf16"), run(FREEZE, "zero.stage=3")]
HOST = "zero.offload_optimizer=cpu"
OFFLOADED = [run(f"train.dtype={dtype}", HOST) for dtype in ("bf16", "fp32")]
AVERAGED = [
    run("train.average.kind=exponential", "zero.stage=2"),
    run("train.average.kind=latest", "checkpoint.keep=5", "train.dtype=bf16"),
    run("train.average.kind=latest", "checkpoint.keep=5", FREEZE),
]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.layouts)])
def test_state_is_what_engine_and_optimizer_hold(world_size: int) -> None:
    """After a backward, when gradients are there and activations are gone."""
    configs = [*RUNS, *FROZEN, *AVERAGED, *OFFLOADED]
    for config, held in zip(configs, run_ranks(held_bytes, world_size, configs)[0], strict=True):
        (rank,) = rank_parameters(config)
        rows = {row.key: row.size for row in held_rows(config, rank, world_size)}
        assert rank.total >= 20_000_000
        assert rank.padding > 0.001 * rank.total
        name = f"ZeRO-{config.zero.stage} {config.train.dtype} without {config.train.freeze}"
        (host,) = host_rows(config, world_size)  # this device is its own host
        sizes = {row.key: row.size for row in host}
        average = sizes.get("host_average", 0) / 2  # a save needs the same once more
        assert sum(rows.values()) + sum(sizes.values()) - average == pytest.approx(held, rel=0.01), name


def test_inputs_on_the_host_are_in_pinned_memory_which_comes_in_powers_of_two() -> None:
    """11 positions of 384 channels in bf16, 8,448 bytes, of each of the layers that are in flight."""
    config = run("data.sequence_length=11", "train.recompute=offload", "train.device=cuda", "train.dtype=bf16")
    (rank,) = host_rows(config, 1)
    (row,) = rank
    assert row.size == config.model.num_hidden_layers * 16384


@pytest.mark.layouts
def test_state_of_pipeline_and_tensor_parallel_ranks() -> None:
    config = run("parallel.pipeline=2", "parallel.tensor=2", "train.dtype=bf16", "model.num_hidden_layers=24")
    every = [held for (held,) in run_ranks(held_bytes, 4, [config])]
    for index, rank in enumerate(rank_parameters(config)):
        planned = sum(row.size for row in held_rows(config, rank, 1))
        assert every[2 * index : 2 * index + 2] == [pytest.approx(planned, rel=0.01)] * 2


def held_bytes(launch: Launch, configs: list[RunConfig]) -> list[int]:
    device = torch.device("cpu")
    launch.prepare(device)
    parallel = configs[0].parallel
    copies = launch.world_size // (parallel.tensor * parallel.pipeline)
    mesh = build_mesh(Topology(pp=parallel.pipeline, tp=parallel.tensor, dp=copies), launch, device)
    found = []
    for config in configs:
        before = storages()  # held: an address that is free is given out again
        count = config.train.global_batch_size // copies
        _, engine = build_model(config, mesh)
        tokens = torch.zeros(1, config.data.sequence_length, dtype=torch.int64)
        engine.forward_backward([MicroBatch(tokens, tokens)] * count, torch.ones(()))
        after = storages()
        found.append(sum(storage.nbytes() for place, storage in after.items() if place not in before))
    return found


def storages() -> dict[int, torch.UntypedStorage]:
    """Every owner of memory that a tensor of this process has, also of gradients and closures."""
    gc.collect()
    found: dict[int, torch.UntypedStorage] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            owner = not thing._is_view()  # a view has no gradient; one of a base written since may not be asked
            for tensor in (thing, thing.grad if owner and thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage
    return found
