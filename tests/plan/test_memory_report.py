"""The ledger as rows of a plan."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.plan.memory.ledger import memory_rows
from megallama.plan.report.run import memory_parts
from megallama.plan.report.table import render, with_notes

CONFIGS = Path(__file__).parents[2] / "configs"


def test_rows_of_the_fullest_rank_sum_to_its_peak() -> None:
    parts = memory_parts(load_config(CONFIGS / "7b.yaml"), dp_size=16)
    memory, by_rank = parts[0], parts[-1]
    *rows, total = memory.rows
    assert sum(row.value for row in rows) == total.value == max(row.value for row in by_rank.rows)
    keys = [row.key for row in rows]
    assert keys[:5] == ["bf16_weights", "fp32_gradient_sums", "fp32_master_weights", "fp32_Adam_moments", "padding"]
    assert keys[5:] == ["activations", "transients", "buffers", "overhead"]
    # Stage 0 has four micro-batches in flight, the last stage one of them and the logits.
    assert rows[5].how.startswith("4 * ")
    last = {row.key: row.size for row in memory_rows(load_config(CONFIGS / "7b.yaml"), 16)[3]}
    assert last["activations"] < rows[5].value / 3.9
    assert last["logits"] > 2**29


@pytest.mark.parametrize(
    ("layout", "dp_size", "communicators"),
    [([1, 1], 1, 0), ([1, 1], 8, 1), ([2, 1], 1, 1), ([2, 1], 8, 3), ([1, 4], 8, 3), ([2, 4], 1, 3), ([2, 4], 8, 5)],
)
def test_a_group_of_the_same_ranks_counts_once(layout: list[int], dp_size: int, communicators: int) -> None:
    """As `build_mesh` makes them: at tp 1, the ranks of the pipeline are those of the model."""
    words = ["train.device=cuda", *(f"parallel.{k}={n}" for k, n in zip(("tensor", "pipeline"), layout, strict=True))]
    overhead = memory_rows(load_config(CONFIGS / "7b.yaml", words), dp_size)[0][-1]
    assert f" {communicators} communicators," in overhead.how


def test_every_pipeline_rank_is_split_into_its_rows_in_text_and_dictionary() -> None:
    config = load_config(CONFIGS / "7b.yaml")
    parts = memory_parts(config, dp_size=16)
    found, text = with_notes(parts), render(parts, 200)
    for index, rows in enumerate(memory_rows(config, 16)):
        split = found[f"memory_pipeline_rank_{index}"]
        assert split.pop("total") == sum(split.values()) == found["memory_by_pipeline_rank"][f"pipeline_rank_{index}"]
        assert split == {row.key: row.size for row in rows}
        line = next(line for line in text.splitlines() if line.startswith(f"pipeline rank {index} "))
        assert ("logits 1.04" in line) == (index == 3)
        shown = [float(term.split()[-1]) for term in line.removesuffix(" GiB").rsplit("  ", 1)[0].split(" + ")]
        assert sum(shown) == pytest.approx(sum(row.size for row in rows) / 2**30, abs=0.05)
    assert len([line for line in text.splitlines() if "peak" in line]) == 1
    (alone, same) = memory_parts(load_config(CONFIGS / "110m.yaml"), dp_size=1)
    assert alone.rows == same.rows


def test_padding_is_apart_from_weights() -> None:
    plain, padded = (
        {row.key: row.size for row in memory_rows(load_config(CONFIGS / "8b.yaml", words), 1)[0]}
        for words in (["parallel.tensor=1"], ["parallel.tensor=4"])
    )
    assert plain["padding"] == 0
    # 64 rows on each of four ranks, in embedding and head, 18 bytes each.
    assert padded["padding"] == 2 * 64 * 4096 * 18


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_needs_less(recompute: str) -> None:
    path = CONFIGS / "7b.yaml"
    plain, less = (
        max(sum(row.size for row in rank) for rank in memory_rows(load_config(path, [f"train.recompute={mode}"]), 16))
        for mode in ("none", recompute)
    )
    assert less < plain


def test_a_search_can_ask_for_thousands() -> None:
    config = load_config(CONFIGS / "405b.yaml")
    memory_rows(config, 8)
    began = time.process_time()
    for _ in range(20):
        memory_rows(config, 8)
    assert (time.process_time() - began) / 20 < 0.02
