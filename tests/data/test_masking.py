"""Masks obey BERT's law, are the same at every layout and start, and hide no end of a document."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megallama.config.schema import IGNORE_INDEX, RunConfig
from megallama.data.loader import Loader, MicroBatch, open_data, prefetched
from megallama.data.masking import Masking, masking_of
from megallama.errors import UserError
from megallama.layout.topology import Topology
from megallama.text.tokenizer import load_tokenizer

Write = Callable[..., str]
EOD, MASK = 256, 257
MASKING = Masking(seed=5, probability=0.15, mask_id=MASK, eod_id=EOD)
LENGTH, SAMPLES = 500, 400


@pytest.fixture
def prefix(write_dataset: Write) -> str:
    """100 documents of 40 ids each, the last of each the end of document."""
    return write_dataset("d", [[*((i * 9 + j) % 200 for j in range(39)), EOD] for i in range(100)])


def config(prefix: str, **train: Any) -> RunConfig:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return RunConfig.model_validate(
        {
            "model": size | {"vocab_size": train.pop("vocab_size", 258)},
            "data": {"path": prefix, "sequence_length": 31, "validation_fraction": 0.1},
            "train": {"global_batch_size": 12, "seed": 5, "objective": "masked"} | train,
        }
    )


def loader(prefix: str, rank: int = 0, dp: int = 1, **train: Any) -> Loader:
    return open_data(config(prefix, **train), Topology(dp=dp), rank).train


def both(batches: list[MicroBatch]) -> torch.Tensor:
    """[2, samples, sequence_length]: tokens and labels."""
    return torch.stack([torch.cat([b.tokens for b in batches]), torch.cat([b.labels for b in batches])])


def drawn() -> tuple[Any, Any, Any]:
    """Ids, what is seen of them, and labels, each [SAMPLES, LENGTH]; every tenth id ends a document."""
    ids = np.random.default_rng(0).integers(0, 256, (SAMPLES, LENGTH))
    ids[:, 9::10] = EOD
    seen, labels = zip(*(MASKING(row, number) for number, row in enumerate(ids)), strict=True)
    return ids, np.stack(seen), np.stack(labels)


def test_fifteen_in_a_hundred_are_chosen_of_which_eight_tenths_hidden_one_random_and_one_kept() -> None:
    ids, seen, labels = drawn()
    chosen, eligible = labels != IGNORE_INDEX, ids != EOD
    hidden, other = seen[chosen] == MASK, (seen[chosen] != MASK) & (seen[chosen] != ids[chosen])
    kept = seen[chosen] == ids[chosen]
    # Of a random id in 257 one is the token itself.
    for found, among, share in [
        (chosen, eligible.sum(), 0.15),
        (hidden, chosen.sum(), 0.8),
        (other, chosen.sum(), 0.1 * 256 / 257),
        (kept, chosen.sum(), 0.1 + 0.1 / 257),
    ]:
        assert abs(found.sum() - among * share) < 4 * math.sqrt(among * share * (1 - share)), share
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(seen[~chosen], ids[~chosen])
    # Random ids are uniform over the 257 of the tokenizer, and places over the sequence.
    counts = np.bincount(seen[chosen][other], minlength=257)
    assert counts.size == 257
    for counted in (counts, chosen.sum(axis=0)[eligible[0]]):
        mean = counted.mean()
        assert abs(((counted - mean) ** 2 / mean).sum() / counted.size - 1) < 0.5, "chi-squared, by degree of freedom"


def test_no_end_of_a_document_is_chosen() -> None:
    ids, seen, labels = drawn()
    assert (seen[ids == EOD] == EOD).all()
    assert (labels[ids == EOD] == IGNORE_INDEX).all()
    alone, labels = MASKING(np.full(8, EOD), 0)
    assert (alone == EOD).all() and (labels == IGNORE_INDEX).all()


def test_each_sample_has_something_to_predict_however_rare_masks_are() -> None:
    rare = replace(MASKING, probability=1e-9)
    ids = np.array([EOD, *range(10), EOD])
    for sample in range(200):
        _, labels = rare(ids, sample)
        assert (labels != IGNORE_INDEX).sum() == 1
    every, labels = replace(MASKING, probability=1.0)(ids, 0)
    assert (labels[1:-1] == ids[1:-1]).all() and (every == MASK).any()


def test_masks_stay_what_they_are() -> None:
    """Written down: a checkpoint that is continued by another numpy must find the masks it was trained with."""
    seen, labels = MASKING(np.arange(100), 7)
    found = {place: int(seen[place]) for place, label in enumerate(labels.tolist()) if label != IGNORE_INDEX}
    assert found == {
        8: 257,
        10: 257,
        13: 257,
        25: 257,
        33: 257,
        35: 257,
        40: 219,
        50: 257,
        51: 257,
        55: 257,
        63: 215,
        67: 257,
        80: 257,
        83: 257,
        89: 5,
        90: 257,
        99: 90,
    }


@pytest.mark.parametrize(("mbs", "dp"), [(1, 2), (2, 3), (3, 4), (6, 2), (12, 1)])
@pytest.mark.parametrize("position", [0, 108, 120])  # an epoch is 116 samples
def test_masks_are_the_same_at_every_layout_and_position(prefix: str, mbs: int, dp: int, position: int) -> None:
    assert loader(prefix).source.samples_per_epoch == 116
    ranks = [loader(prefix, rank, dp, micro_batch_size=mbs).step(position) for rank in range(dp)]
    batches = [batch for micro in zip(*ranks, strict=True) for batch in micro]
    one = both(loader(prefix).step(position))
    assert torch.equal(both(batches), one)
    assert (one[0] == MASK).any()
    assert torch.equal(both(next(prefetched(loader(prefix), position))), one), "in another thread"


def test_epochs_and_seeds_have_masks_of_their_own() -> None:
    ids = np.arange(200)
    found = {tuple(MASKING(ids, sample)[0]) for sample in range(20)}
    found |= {tuple(replace(MASKING, seed=seed)(ids, 0)[0]) for seed in range(10, 30)}
    assert len(found) == 40


def test_an_evaluation_has_the_same_masks_each_time_and_at_every_layout(prefix: str) -> None:
    def rows(mbs: int, dp: int) -> list[list[int]]:
        data = [open_data(config(prefix, micro_batch_size=mbs), Topology(dp=dp), rank).validation for rank in range(dp)]
        micros = zip(*(list(one.evaluation(7)) for one in data if one is not None), strict=True)
        found = [both([batch]) for micro in micros for batch in micro]
        return [row for row in torch.cat(found, dim=1)[1].tolist() if row != [IGNORE_INDEX] * 31]

    one = rows(1, 1)
    assert len(one) == 7
    assert rows(1, 1) == rows(2, 2) == rows(4, 3) == one


def test_a_causal_run_has_no_masks(prefix: str) -> None:
    batch = loader(prefix, objective="causal", vocab_size=257).step(0)[0]
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])


def test_a_vocabulary_without_room_for_the_mask_token_is_refused(prefix: str) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size=257 leaves no id .* set model\.vocab_size=258 or more"):
        loader(prefix, vocab_size=257)
    assert masking_of(config(prefix, seed=9, mask_probability=0.3), load_tokenizer("bytes")) == Masking(
        9, 0.3, 257, 256
    )


def test_data_that_hold_the_mask_token_are_refused(write_dataset: Write) -> None:
    prefix = write_dataset("foreign", [[*range(30), MASK]] * 100)
    with pytest.raises(UserError, match=r"the data of .*foreign hold the id 257, and data\.tokenizer has 257 ids"):
        loader(prefix)
    with pytest.raises(UserError, match=r"the data hold the id 257, and data\.tokenizer has 257 ids"):
        Masking(9, 0.3, MASK, 256)(np.arange(1, MASK + 1), 0)
