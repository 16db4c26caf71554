"""The layouts that a search tries, and those that are out before any is tried. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from megallama.config.schema import RunConfig, Schedule
from megallama.config.values import MOST_PIPELINE
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu
from megallama.layout.batching import dp_size
from megallama.layout.check import check_config
from megallama.layout.compiled import why_not_compiled
from megallama.layout.legal import divisors, legal_tensors
from megallama.layout.schedules import SCHEDULES, chunks, legal_micro_batches

Reject = Callable[[str, str, int], None]
"""Takes why layouts are out, where they are, and how many they are."""
ZERO_STAGES = (1, 2, 3)
RECOMPUTE = ("none", "selective", "full")
"""Each keeps less for backward than the one before it."""
MOST_MICRO_BATCH = 64
MOST_STAGES = 256
"""Fewer than a run may have: a search lays out hundreds of layouts."""
LEAST_PART = 8192
"""Positions of a sequence on a rank: shorter sequences are not cut by context parallelism."""


def schedules(layers: int, pp: int) -> list[tuple[Schedule, int]]:
    """Schedules with the stages of each rank: of interleaved1f1b some up to as many as a rank has layers."""
    if pp == 1:
        return [("1f1b", 1)]
    most = layers // pp
    several = sorted({each for each in (2, 3, 4, *divisors(max(1, most))) if 2 <= each <= most})
    return [
        (name, each)
        for name, row in SCHEDULES.items()
        for each in ((row.stages_per_rank,) if row.stages_per_rank else several)
    ]


def contexts(config: RunConfig, world_size: int) -> list[RunConfig]:
    """The run at each cp that divides the world, powers of two in order: 1 alone unless sequences are long."""
    most = max(1, config.data.sequence_length // LEAST_PART)
    sizes = [cp for cp in (1 << n for n in range(most.bit_length())) if world_size % cp == 0]
    parallel = config.parallel
    return [config.model_copy(update={"parallel": parallel.model_copy(update={"context": cp})}) for cp in sizes]


def tensor_sizes(config: RunConfig, world_size: int, gpu: Gpu, reject: Reject) -> list[int]:
    """tp that divide model and world, within a node."""
    node, model = int(gpu.gpus_per_node or 1), config.model
    dividing, legal = divisors(world_size), set(legal_tensors(config))
    far = [tp for tp in dividing if tp > node]
    cut = [tp for tp in dividing if tp <= node and tp not in legal]
    widths = f"{model.num_attention_heads} heads, {model.kv_heads * model.head_size} of keys, MLP or sequence"
    for out, why in ((far, f"tp crosses the node of {node} GPUs"), (cut, f"tp does not divide {widths}")):
        for tp in out:
            reject(why, f"tp {tp}", sum(_count(config, pp, world_size // tp) for pp in divisors(world_size // tp)))
    return [tp for tp in dividing if tp <= node and tp in legal]


def pipeline_sizes(config: RunConfig, ranks: int, tp: int, reject: Reject) -> list[int]:
    """pp that divide the ranks, with a layer for each stage and a batch for each copy."""
    layers, batch = config.model.num_hidden_layers, config.train.common_batch
    batches = "every batch of train.batch_ramp" if config.train.batch_ramp else f"train.global_batch_size={batch}"
    dividing, most = divisors(ranks), min(layers, MOST_PIPELINE)
    many = [pp for pp in dividing if pp > most]
    uneven = [pp for pp in dividing if pp <= most and batch % (ranks // pp)]
    for out, why in (
        (many, f"pp has more stages than {f'{layers} layers' if most == layers else most}"),
        (uneven, f"dp does not divide {batches}"),
    ):
        for pp in out:
            reject(why, f"tp {tp} pp {pp}", _count(config, pp, ranks))
    return [pp for pp in dividing if pp not in many and pp not in uneven]


def _count(config: RunConfig, pp: int, ranks: int) -> int:
    """Layouts at this pipeline size, legal or not. With a single copy the ZeRO stages are one, as in a pipeline."""
    dp = ranks // pp
    stages = len(ZERO_STAGES) if dp > 1 and pp == 1 else 1
    tried = len(schedules(config.model.num_hidden_layers, pp))
    return tried * stages * len(RECOMPUTE) * max(1, len(micro_batch_sizes(config.train.common_batch, dp)))


def micro_batch_sizes(batch: int, dp: int) -> list[int]:
    """Powers of two that divide a copy's sequences."""
    most = min(MOST_MICRO_BATCH, max(1, batch // dp))
    return [size for size in (1 << n for n in range(most.bit_length())) if batch % (size * dp) == 0]


def refusal(config: RunConfig, world_size: int) -> str | None:
    """Why training would refuse the layout, in the words of a class of layouts."""
    parallel, layers, each = config.parallel, config.model.num_hidden_layers, chunks(config.parallel)
    if parallel.pipeline * each > MOST_STAGES:
        return f"more than {MOST_STAGES} stages"
    if parallel.pipeline * each > layers:
        return f"more stages than {layers} layers"
    samples = dp_size(config, world_size) * config.train.micro_batch_size
    if not all(legal_micro_batches(parallel, batch // samples) for batch in config.train.batches):
        return f"{parallel.schedule} cannot run so few micro-batches over its stages"
    try:
        check_config(config, world_size)
    except UserError as error:
        return str(error)
    return why_not_compiled(config) if config.train.compile is True else None


def choices(config: RunConfig, pp: int, dp: int) -> Iterator[dict[str, Any]]:
    """Everything but the sizes of the mesh; what keeps less comes before what keeps more."""
    stages = ZERO_STAGES if pp == 1 and dp * config.parallel.context > 1 else (1,)
    sizes = micro_batch_sizes(config.train.common_batch, dp)
    for (schedule, each), zero in product(schedules(config.model.num_hidden_layers, pp), stages):
        for recompute, size in product(reversed(RECOMPUTE), sizes):
            layout = {"schedule": schedule, "chunks": max(2, each), "zero": zero, "recompute": recompute}
            yield {**layout, "micro_batch_size": size}


def with_layout(config: RunConfig, tp: int, pp: int, choice: dict[str, Any]) -> RunConfig:
    """The run at that layout; copied field by field, since checking a whole tree again takes ten times as long."""
    axes = {"tensor": tp, "pipeline": pp, "layers_per_stage": "balanced"}
    values = {
        "parallel": {**axes, "schedule": choice["schedule"], "chunks": choice["chunks"]},
        "train": {"micro_batch_size": choice["micro_batch_size"], "recompute": choice["recompute"]},
        "zero": {"stage": choice["zero"]},
    }
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=each) for name, each in values.items()}
    )
