"""Row C5 with two data-parallel ranks over gloo: the engine at ZeRO 1 and 2 beside torch's own.

All contenders live in the same two processes of one thread each, around the same model with the same weights, train on
the same ids and take turns.
"""

from __future__ import annotations

from contextlib import nullcontext
from statistics import median

import torch
from contenders.steps import adamw, engine_step, initialised_llama, random_batches
from rows.table import Aim, Found, Line, median_ratio, spread
from rows.turns import Step, Turns, difference, take_turns
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh, build_mesh
from megallama.parallel.spawn import run_ranks

RANKS = 2
LOSS_TOLERANCE = 1e-4
OURS, PEER = "engine, ZeRO 1", "DDP, ZeroRedundancyOptimizer"


def row(name: str, config: RunConfig, steps: int, rounds: int) -> Found:
    """All contenders; `config` has the global batch of both ranks."""
    ranks = run_ranks(measure, RANKS, config, steps, rounds, timeout=900.0)
    found, turns = Found(), ranks[0]
    # Theirs is a rank's own, ours that of both.
    losses = {
        each: [sum(of) / RANKS for of in zip(*(rank[each].losses for rank in ranks), strict=True)] for each in turns
    }
    for contender, mine in turns.items():
        differs = difference(losses[OURS], losses[contender])
        if not differs <= LOSS_TOLERANCE:
            found.wrong.append(f"the losses of {contender} differ from ours by {differs:.1e}")
        ratio = median_ratio(turns[OURS].round_medians, mine.round_medians)
        seconds = mine.all_seconds
        found.lines.append(Line(name, contender, median(seconds), "ms", spread(seconds), ratio, None, None, differs))
    shares = turns[OURS].round_medians, turns[PEER].round_medians
    found.aims.append(Aim(f"time {OURS} / {PEER}", median_ratio(*shares), 1.0))
    return found


def measure(launch: Launch, config: RunConfig, steps: int, rounds: int) -> dict[str, Turns]:
    """Of every contender, as one rank sees it."""
    launch.prepare(torch.device("cpu"))
    mesh = build_mesh(Topology(dp=RANKS), launch, torch.device("cpu"))
    made = {
        OURS: engine(config, mesh, 1),
        "engine, ZeRO 2": engine(config, mesh, 2),
        PEER: distributed(config, sharded=True),
        "DDP": distributed(config, sharded=False),
    }
    return take_turns(made, lambda: (batches[mesh.rank :: RANKS] for batches in random_batches(config)), steps, rounds)


def engine(config: RunConfig, mesh: ParallelMesh, stage: int) -> Step:
    """megallama's training step."""
    return engine_step(config.model_copy(update={"zero": config.zero.model_copy(update={"stage": stage})}), mesh)[0]


def distributed(config: RunConfig, *, sharded: bool) -> Step:
    """torch's DistributedDataParallel around our model, with AdamW whole on each rank or cut over them."""
    model = initialised_llama(config)
    wrapped, weights = DistributedDataParallel(model), list(model.parameters())
    optimizer: torch.optim.Optimizer = adamw(weights, config)
    if sharded:
        optimizer = ZeroRedundancyOptimizer(
            [{key: group[key] for key in ("params", "weight_decay")} for group in optimizer.param_groups],
            torch.optim.AdamW,
            **{key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "fused")},
        )

    def step(batches: list[MicroBatch]) -> Tensor:
        total = torch.zeros(())
        for batch in batches:
            with nullcontext() if batch is batches[-1] else wrapped.no_sync():
                loss = wrapped(batch.tokens, batch.labels) / (len(batches) * batch.labels.numel())
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(weights, config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step
