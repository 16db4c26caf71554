"""Batches and worlds that do not fit each other are refused with a fix that works, and all others are spread."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.layout.batching import Batching, dp_size, gradient_accumulation_steps
from megallama.layout.check import check_config
from tests.layout.test_check import Refusal, check_refusal, run

REFUSED: list[Refusal] = [
    (["parallel.tensor=4"], 6,
     "a world size of 6 is not a multiple of parallel.tensor * parallel.pipeline * parallel.context = 4 * 1 * 1 = 4; "
     "nearest legal: world size 4 or 8, or parallel.tensor=2",
     # At tensor 2 the dp of 3 asks for another batch as well.
     [(["parallel.tensor=4"], 4), (["parallel.tensor=4"], 8),
      (["parallel.tensor=2", "train.global_batch_size=12"], 6)]),
    (["parallel.tensor=2", "parallel.pipeline=2"], 3, "= 2 * 2 * 1 = 4; nearest legal: world size 4",
     [(["parallel.tensor=2", "parallel.pipeline=2"], 4)]),
    (["parallel.context=2"], 3, "= 1 * 1 * 2 = 2; nearest legal: world size 2 or 4, or parallel.context=1 or 3",
     [(["parallel.context=2"], 2), (["parallel.context=2"], 4), (["parallel.context=3"], 3)]),
    ([], 0, "a world size of 0 is not a multiple", [([], 1)]),
    ([], 5, "train.global_batch_size=16 is not a multiple of train.micro_batch_size * dp = 2 * 5 = 10; "
     "nearest legal: a world size of 4 or 8", [([], 4), ([], 8)]),
    (["train.global_batch_size=3"], 4, "train.global_batch_size=3 is not a multiple of train.micro_batch_size * dp = "
     "2 * 4 = 8; nearest legal: train.global_batch_size=8", [(["train.global_batch_size=8"], 4)]),
    (["parallel.pipeline=2", "parallel.schedule=dualpipev", "train.micro_batch_size=8"], 4,
     "train.global_batch_size / (train.micro_batch_size * dp) = 16 / (8 * 2) = 1 micro-batches, which dualpipev cannot "
     "run over parallel.pipeline=2; nearest legal: train.micro_batch_size=2",
     [(["parallel.pipeline=2", "parallel.schedule=dualpipev", "train.micro_batch_size=2"], 4)]),
    (["parallel.pipeline=2", "parallel.schedule=zbvzerobubble", "train.micro_batch_size=8"], 2,
     "= 2 micro-batches, which zbvzerobubble cannot run over parallel.pipeline=2; nearest legal: "
     "train.micro_batch_size=4",
     [(["parallel.pipeline=2", "parallel.schedule=zbvzerobubble", "train.micro_batch_size=4"], 2)]),
    (["parallel.pipeline=2", "parallel.schedule=interleaved1f1b", "train.global_batch_size=10"], 2,
     "= 5 micro-batches, which interleaved1f1b cannot run over parallel.pipeline=2; nearest legal: "
     "train.micro_batch_size=1 or 5",
     [(["parallel.pipeline=2", "parallel.schedule=interleaved1f1b", "train.global_batch_size=10",
        f"train.micro_batch_size={size}"], 2) for size in (1, 5)]),
    (["parallel.pipeline=4", "train.micro_batch_size=8"], 4,
     "= 2 micro-batches, which 1f1b cannot run over parallel.pipeline=4; nearest legal: train.micro_batch_size=4",
     [(["parallel.pipeline=4", "train.micro_batch_size=4"], 4)]),
]  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSED, ids=[f"{row[0]} on {row[1]}" for row in REFUSED])
def test_a_refusal_names_keys_and_numbers_and_its_advice_passes(tmp_path: Path, refusal: Refusal) -> None:
    check_refusal(tmp_path, refusal)


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        ([], 1, Batching(1, 1, 8)),
        ([], 4, Batching(4, 4, 2)),
        (["parallel.tensor=4"], 8, Batching(8, 2, 4)),
        (["parallel.tensor=2", "parallel.pipeline=3"], 6, Batching(6, 1, 8)),
        (
            ["parallel.pipeline=2", "parallel.schedule=dualpipev", "model.tie_word_embeddings=true"],
            2,
            Batching(2, 1, 8),
        ),
        (["zero.stage=2", "train.compile=true", "train.recompute=full"], 2, Batching(2, 2, 4)),
        (["model.num_key_value_heads=1", "parallel.tensor=4"], 4, Batching(4, 1, 8)),
        (["parallel.context=2", "parallel.tensor=2", "parallel.pipeline=2"], 16, Batching(16, 2, 4)),
    ],
)
def test_legal_runs_get_their_batching(
    tmp_path: Path, overrides: list[str], world_size: int, expected: Batching
) -> None:
    config = run(tmp_path, overrides)
    assert check_config(config, world_size) == expected
    assert dp_size(config, world_size) == expected.dp_size
    assert gradient_accumulation_steps(config, expected.dp_size) == expected.gradient_accumulation_steps
