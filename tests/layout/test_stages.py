"""How layers are spread over stages, and stages over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import ParallelConfig, RunConfig, Schedule
from megallama.layout.counts import count_parameters, padded_vocabulary
from megallama.layout.schedules import legal_micro_batches, stage_ranks
from megallama.layout.stages import balanced, head_in_layers, layers_per_stage, stages
from megallama.plan.memory.state import rank_parameters

CONFIGS = Path(__file__).parents[2] / "configs"


def run(*overrides: str) -> RunConfig:
    return load_config(CONFIGS / "8b.yaml", ["parallel.tensor=1", *overrides])


@pytest.mark.parametrize(
    ("schedule", "pp", "ranks"),
    [
        ("1f1b", 4, [0, 1, 2, 3]),
        ("interleaved1f1b", 2, [0, 1, 0, 1]),
        ("dualpipev", 3, [0, 1, 2, 2, 1, 0]),
        ("zbvzerobubble", 2, [0, 1, 1, 0]),
        ("dualpipev", 1, [0]),
        ("interleaved1f1b", 1, [0]),
    ],
)
def test_each_stage_is_on_its_rank(schedule: Schedule, pp: int, ranks: list[int]) -> None:
    assert stage_ranks(ParallelConfig(pipeline=pp, schedule=schedule)) == ranks


def test_interleaving_takes_as_many_chunks_as_asked() -> None:
    assert stage_ranks(ParallelConfig(pipeline=2, schedule="interleaved1f1b", chunks=3)) == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("layers", range(1, 14))
@pytest.mark.parametrize("head", [0.0, 0.62, 2.5, 40.0])
def test_a_balanced_split_has_the_smallest_slowest_stage_there_is(layers: int, head: float) -> None:
    for count in range(1, layers + 1):
        split = balanced(layers, count, head)
        assert sum(split) == layers
        assert min(split) >= 1
        slowest = max([*split[:-1], split[-1] + head])
        best = min(
            max(last + head, -(-(layers - last) // (count - 1)) if count > 1 else 0.0)
            for last in range(1, layers - count + 2)
            if count > 1 or last == layers
        )
        assert slowest == pytest.approx(best)


def test_the_surplus_goes_to_middle_stages_before_the_first() -> None:
    assert balanced(5, 4, 0.5) == (1, 2, 1, 1)
    assert balanced(9, 8, 0.0) == (1, 2, 1, 1, 1, 1, 1, 1)


def test_llama_3_8b_has_fewer_layers_beside_its_large_head() -> None:
    """A vocabulary of 128,256 costs more than two layers."""
    assert 2.08 < head_in_layers(run().model, 8192, "causal") < 2.09
    assert layers_per_stage(run("parallel.pipeline=4")) == (8, 9, 9, 6)
    assert layers_per_stage(run("parallel.pipeline=4", "parallel.layers_per_stage=even")) == (8, 8, 8, 8)
    assert layers_per_stage(run("parallel.pipeline=4", "parallel.layers_per_stage=[9, 9, 9, 5]")) == (9, 9, 9, 5)


def test_stages_follow_one_another() -> None:
    every = stages(run("parallel.pipeline=4", "parallel.schedule=dualpipev"))
    assert [layer for stage in every for layer in stage.layers] == list(range(32))
    assert [stage.index for stage in every] == list(range(8))


@pytest.mark.parametrize(
    ("schedule", "pp", "legal"),
    [
        ("1f1b", 4, [4, 5, 6, 7, 8, 9, 10]),
        ("interleaved1f1b", 4, [1, 2, 3, 4, 5, 6, 7, 8, 10]),
        ("dualpipev", 4, [8, 9, 10]),
        ("zbvzerobubble", 4, [7, 8, 9, 10]),
    ],
)
def test_micro_batches_that_a_schedule_takes(schedule: Schedule, pp: int, legal: list[int]) -> None:
    parallel = ParallelConfig(pipeline=pp, schedule=schedule)
    assert [n for n in range(11) if legal_micro_batches(parallel, n)] == legal


def test_pipeline_ranks_of_llama_3_8b() -> None:
    ranks = rank_parameters(run("parallel.pipeline=4", "parallel.layers_per_stage=even"))
    assert [rank.total for rank in ranks] == [2_270_232_576, 1_744_896_000, 1_744_896_000, 2_270_236_672]
    assert sum(rank.total for rank in ranks) == 8_030_261_248


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_ranks_add_up_to_the_model_with_norms_once_per_tensor_rank(tied: bool, tp: int, pp: int) -> None:
    config = run(
        f"parallel.tensor={tp}",
        f"parallel.pipeline={pp}",
        "parallel.schedule=zbvzerobubble",
        f"model.tie_word_embeddings={tied}",
        "model.vocab_size=1000",
    )
    ranks = rank_parameters(config)
    held = sum(tp * rank.sharded + rank.replicated for rank in ranks)
    assert held == count_parameters(config.model).total
    tables = 1 if tied else 2
    assert tp * sum(rank.padding for rank in ranks) == tables * (padded_vocabulary(1000, tp) - 1000) * 4096
