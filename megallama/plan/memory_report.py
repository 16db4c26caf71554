"""The memory ledger as parts of a plan: the fullest pipeline rank row by row, then each rank's sum. Pure."""

from __future__ import annotations

from megallama.config.schema import RunConfig
from megallama.plan.ledger import memory_rows
from megallama.plan.table import Part, Row


def memory_parts(config: RunConfig, dp_size: int) -> list[Part]:
    """Bytes that a device must have under `memory`; by pipeline rank under `memory_by_pipeline_rank`."""
    ranks = memory_rows(config, dp_size)
    sums = [sum(row.size for row in rows) for rows in ranks]
    fullest = sums.index(max(sums))
    rows = [Row(row.key, row.name, row.how, row.size, "GiB") for row in ranks[fullest]]
    rows.append(Row("total", "peak", "sum", sums[fullest], "GiB"))
    place = f", pipeline rank {fullest}" if len(ranks) > 1 else ""
    title = f"Memory on one rank, ZeRO-{config.zero.stage}, {config.train.dtype}{place}"
    parts = [Part("memory", title, tuple(rows))]
    if len(ranks) > 1:
        each = [Row(f"pipeline_rank_{i}", f"pipeline rank {i}", "peak", size, "GiB") for i, size in enumerate(sums)]
        parts.append(Part("memory_by_pipeline_rank", "Memory by pipeline rank", tuple(each)))
    return parts
