"""Whether a run fits its devices, and the nearest change with which it does. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.check import check_config, dp_size
from megallama.plan.hardware import Gpu
from megallama.plan.memory.ledger import memory_rows
from megallama.plan.memory.lines import GIB

USABLE = 0.97
"""The share of a device's memory that is left to a run: the driver keeps 1 to 3 %."""


def usable_bytes(gpu: Gpu) -> int:
    """The memory that one device leaves to a run; UserError where that is not known."""
    return int(gpu.known("memory_gib") * GIB * USABLE)


def rank_bytes(config: RunConfig, world_size: int) -> list[int]:
    """What the device of a rank at each place of the pipeline must have."""
    return [sum(row.size for row in rows) for rows in memory_rows(config, dp_size(config, world_size))]


def refuse_too_large(config: RunConfig, world_size: int, gpu: Gpu) -> None:
    """UserError where a rank needs more than its device has, with the nearest change that fits."""
    limit, sizes = usable_bytes(gpu), rank_bytes(config, world_size)
    if max(sizes) <= limit:
        return
    where = f" on pipeline rank {sizes.index(max(sizes))}" if len(sizes) > 1 else ""
    raise UserError(
        f"the run needs {max(sizes) / GIB:.1f} GiB{where}, {(max(sizes) - limit) / GIB:.1f} GiB more than the "
        f"{limit / GIB:.1f} GiB that {gpu.key} leaves to it; {nearest_fit(config, world_size, gpu)}"
    )


def nearest_fit(config: RunConfig, world_size: int, gpu: Gpu) -> str:
    """The first of the changes below that brings every rank under what `gpu` leaves to it, in words."""
    limit = usable_bytes(gpu)
    for changed, ranks, words in changes(config, world_size, int(gpu.gpus_per_node or 1)):
        try:
            check_config(changed, ranks)
        except UserError:
            continue
        if max(rank_bytes(changed, ranks)) <= limit:
            return f"nearest that fits: {words}"
    return "no single change fits; try --search with more GPUs"


def changes(config: RunConfig, world_size: int, node: int | None = None) -> Iterator[tuple[RunConfig, int, str]]:
    """Runs that need less, with their ranks, from what costs the least time on: batch, ZeRO, recomputation, layout.

    Tensor parallelism stays within `node` GPUs, where that is known.
    """
    train, zero = config.train, config.zero
    smaller = [size for size in range(train.micro_batch_size - 1, 0, -1) if train.micro_batch_size % size == 0]
    for size in smaller:
        changed = train.model_copy(update={"micro_batch_size": size})
        yield config.model_copy(update={"train": changed}), world_size, f"train.micro_batch_size={size}"
    for stage in range(zero.stage + 1, 4):
        changed_zero = zero.model_copy(update={"stage": stage})
        yield config.model_copy(update={"zero": changed_zero}), world_size, f"zero.stage={stage}"
    for recompute in ("selective", "full"):
        changed = train.model_copy(update={"recompute": recompute})
        yield config.model_copy(update={"train": changed}), world_size, f"train.recompute={recompute}"
    for factor in (2, 4, 8):
        for wider, words in (_more_tensor(config, factor), _more_pipeline(config, factor)):
            if node is not None and config.parallel.tensor < wider.parallel.tensor > node:
                continue
            yield wider, world_size, words
            yield wider, factor * world_size, f"{words} with --gpus {factor * world_size}"
    for factor in (2, 4, 8, 16):
        yield config, factor * world_size, f"--gpus {factor * world_size}"


def _more_tensor(config: RunConfig, factor: int) -> tuple[RunConfig, str]:
    tensor = factor * config.parallel.tensor
    changed = config.parallel.model_copy(update={"tensor": tensor})
    return config.model_copy(update={"parallel": changed}), f"parallel.tensor={tensor}"


def _more_pipeline(config: RunConfig, factor: int) -> tuple[RunConfig, str]:
    pipeline = factor * config.parallel.pipeline
    update: dict[str, object] = {"pipeline": pipeline}
    words = f"parallel.pipeline={pipeline}"
    if isinstance(config.parallel.layers_per_stage, tuple):  # a list of fewer stages
        update["layers_per_stage"] = "balanced"
        words += " parallel.layers_per_stage=balanced"
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=update)}), words
