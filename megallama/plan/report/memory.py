"""The memory ledger as parts of a plan: the fullest pipeline rank row by row, then every rank in a line. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from megallama.config.schema import RunConfig
from megallama.plan.hardware import Gpu
from megallama.plan.memory.fit import USABLE, rank_bytes, usable_bytes
from megallama.plan.memory.ledger import memory_rows
from megallama.plan.memory.lines import GIB, MemoryRow
from megallama.plan.report.table import Part, Row

_LEAST_SHOWN = 0.005 * GIB
"""The least that is shown in the line of a rank: less would be 0.00 there."""
_SHORT = {
    "bf16_weights": "weights",
    "fp32_weights": "weights",
    "fp32_gradients": "gradients",
    "fp32_gradient_sums": "gradients",
    "fp32_master_weights": "master",
    "fp32_Adam_moments": "moments",
    "waiting_gradients": "waiting gradients",
}
"""By key; the other keys are short."""


def memory_parts(config: RunConfig, dp_size: int) -> list[Part]:
    """Bytes that a device must have under `memory`, of each pipeline rank under `memory_pipeline_rank_0` and so on.

    The sums of all ranks are under `memory_by_pipeline_rank`, where there are several.
    """
    ranks = memory_rows(config, dp_size)
    sums = [sum(row.size for row in rows) for rows in ranks]
    fullest = sums.index(max(sums))
    place = f", pipeline rank {fullest}" if len(ranks) > 1 else ""
    title = f"Memory on one rank, ZeRO-{config.zero.stage}, {config.train.dtype}{place}"
    parts = [_memory("memory", title, ranks[fullest])]
    parts += [_memory(f"memory_pipeline_rank_{i}", "", rows, for_scripts=True) for i, rows in enumerate(ranks)]
    if len(ranks) > 1:
        each = [
            Row(f"pipeline_rank_{i}", f"pipeline rank {i}", _line(rows), size, "GiB")
            for i, (rows, size) in enumerate(zip(ranks, sums, strict=True))
        ]
        parts.append(Part("memory_by_pipeline_rank", "Memory by pipeline rank, GiB", tuple(each)))
    return parts


def fit_part(config: RunConfig, world_size: int, gpu: Gpu) -> Part:
    """What the fullest rank needs beside what a device leaves to it; UserError where the memory is not known."""
    needed, usable = max(rank_bytes(config, world_size)), usable_bytes(gpu)
    rows = (
        Row("needed", "needed", "peak of the fullest rank", needed, "GiB"),
        Row("usable", "usable", f"{USABLE:.0%} of {gpu.memory_gib:g} GiB", usable, "GiB"),
        Row("free", "left over", "usable - needed", usable - needed, "GiB"),
    )
    return Part("fit", f"{'Fits' if needed <= usable else 'Does not fit'} {gpu.name}", rows)


def _memory(key: str, title: str, rows: Sequence[MemoryRow], for_scripts: bool = False) -> Part:
    found = [Row(row.key, row.name, row.how, row.size, "GiB") for row in rows]
    found.append(Row("total", "peak", "sum", sum(row.size for row in rows), "GiB"))
    return Part(key, title, tuple(found), for_scripts=for_scripts)


def _line(rows: Sequence[MemoryRow]) -> str:
    """`weights 1.63 + gradients 3.26 + ...`."""
    return " + ".join(
        f"{_SHORT.get(row.key, row.key)} {row.size / GIB:.2f}" for row in rows if row.size >= _LEAST_SHOWN
    )
