"""With the cache as without it, token for token, alone and in batches, in the window and beyond."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallama.generation.batch import Batch, Row
from megallama.generation.decoder import Decoder, first_seen
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import Axis
from megallama.parallel.spawn import run_ranks
from tests.generation.tiny import GREEDY, WINDOW, loaded, shape, together, weights, without_cache

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
PROMPTS = [[7], list(range(9)), list(range(50, 50 + WINDOW)), list(range(100, 100 + 3 * WINDOW)), [1, 2]]
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "plain": {"num_key_value_heads": None},
    "one key head": {"num_key_value_heads": 1},
    "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "tied, own head_dim": {"tie_word_embeddings": True, "head_dim": 12},
    "odd window": {"max_position_embeddings": 11},
    "window of one": {"max_position_embeddings": 1},
    "norms of queries and keys": {"qk_norm": True, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_unequal_prompts_is_written_as_each_is_without_a_cache(variant: str) -> None:
    model = loaded(shape(**VARIANTS[variant]))
    count = 3 * WINDOW
    assert together(model, PROMPTS, count) == [without_cache(model, prompt, count) for prompt in PROMPTS]


def test_the_cache_grows_with_what_is_written() -> None:
    model = loaded(shape(max_position_embeddings=1024))
    assert Decoder(model.model).positions == 256
    prompt = list(range(200))
    assert together(model, [prompt, [3]], 130) == [without_cache(model, each, 130) for each in (prompt, [3])]


def test_rows_join_and_leave_at_any_step() -> None:
    model = loaded()
    batch, prompts = Batch(model, 3), [[5] * n for n in (3, 1, 9, 4, 30, 2)]
    rows = [Row(model, prompt, 4 + 3 * number, GREEDY) for number, prompt in enumerate(prompts)]
    waiting = list(rows)
    left_early = rows[4]
    while waiting or batch.rows:
        if waiting and len(batch.rows) < batch.size:
            batch.add(waiting.pop(0))
        if left_early in batch.rows and left_early.new_tokens == 5:
            batch.remove(left_early)
        batch.step()
    for row, prompt in zip(rows, prompts, strict=True):
        assert row.ids[row.begin :] == without_cache(model, prompt, row.new_tokens)
        assert (row.ended is None) == (row is left_early)


@pytest.mark.parametrize("window", [1, 2, 11, 24, 1000])
def test_the_window_moves_by_halves_and_holds_the_last_tokens(window: int) -> None:
    firsts = [first_seen(length, window) for length in range(1, 5 * window)]
    assert firsts[:window] == [0] * window
    seen = [length - first for length, first in enumerate(firsts, start=1)]
    assert max(seen) == window
    assert min(seen[window:], default=window) > window - max(1, window // 2) - 1
    assert len(set(firsts)) <= 4 * window / max(1, window // 2) + 2


def test_a_token_costs_no_more_the_more_stand_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded()
    tokens: list[int] = []
    embed = model.model.embed_tokens
    assert embed is not None
    embed.register_forward_hook(lambda _, given, __: tokens.append(given[0].numel()))
    together(model, [[1] * WINDOW], 20 * WINDOW)
    assert sum(tokens) < 3.2 * 20 * WINDOW  # each once, and after each half window that half once more
    assert tokens.count(1) == 20 * WINDOW


def write_as_rank(launch: Launch, changes: dict[str, Any]) -> list[list[int]]:
    import torch.distributed as dist

    from megallama.parallel.join import join

    join(launch, torch.device("cpu"))
    tp = Axis(dist.group.WORLD, launch.rank, launch.world_size)
    return together(loaded(shape(**changes), tp), PROMPTS, 2 * WINDOW)


@pytest.mark.parametrize(
    "changes",
    [{"num_key_value_heads": 2}, {"num_key_value_heads": 1, "qk_norm": True}],
    ids=["a head for each rank", "a head for both, normalised"],
)
def test_two_ranks_write_what_one_writes(changes: dict[str, Any]) -> None:
    alone = together(loaded(shape(**changes)), PROMPTS, 2 * WINDOW)
    assert run_ranks(write_as_rank, 2, changes) == [alone, alone]


def test_what_stands_behind_a_row_never_reaches_it() -> None:
    """Fails where a row's mask or its length is off by one."""
    decoders = [Decoder(loaded().model, 2) for _ in range(2)]
    for decoder in decoders:
        decoder.read([0, 1], [[9] * 20, [1, 2]])
    decoders[1]._cache[:, :, 1, :, 3:] = 1e4
    clean, behind = [decoder.advance([4, 3], [20, 2]) for decoder in decoders]
    assert torch.equal(clean, behind)


def test_a_row_that_ended_by_infinities_does_not_reach_the_next_in_its_place() -> None:
    config = shape()
    embedding = weights(config)["model.embed_tokens.weight"].clone()
    embedding[7] = torch.nan
    model = loaded(config, **{"model.embed_tokens.weight": embedding})
    batch, long = Batch(model, 2), Row(model, [1] * 9, 12, GREEDY)
    ill, well = Row(model, [7] * 20, 9, GREEDY), Row(model, [2, 3], 9, GREEDY)
    batch.add(long)
    batch.add(ill)
    batch.step()
    assert ill.ended == "error"
    batch.add(well)
    while batch.rows:
        batch.step()
    assert [row.ids[row.begin :] for row in (long, well)] == [
        without_cache(model, [1] * 9, 12),
        without_cache(model, [2, 3], 9),
    ]
