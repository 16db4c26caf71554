"""Batches are the same at every layout, a position says everything, and unfit data is refused with its numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallama.config.data_keys import DataConfig
from megallama.config.schema import IGNORE_INDEX
from megallama.corpus.building.build import build_dataset
from megallama.data.dataset import SCANNED_TOKENS, TokenDataset, split_documents
from megallama.data.indexed import HEADER, bin_path, finish_index, idx_path
from megallama.data.loader import Loader, MicroBatch, prefetched
from megallama.data.source import open_source
from megallama.errors import UserError

Write = Callable[..., str]
EOD = 256


@pytest.fixture
def prefix(write_dataset: Write) -> str:
    """100 documents of 10 ids each, the last of each the end of document; otherwise ids count upwards."""
    return write_dataset("d", [[*((i * 9 + j) % 200 for j in range(9)), EOD] for i in range(100)])


def config(prefix: str, **keys: Any) -> DataConfig:
    return DataConfig(path=prefix, **({"sequence_length": 7, "validation_fraction": 0.1} | keys))


def loader(prefix: str, mbs: int = 1, gbs: int = 12, rank: int = 0, dp: int = 1, seed: int = 5, **keys: Any) -> Loader:
    split, vocab_size = keys.pop("split", "train"), keys.pop("vocab_size", 257)
    return Loader(open_source(config(prefix, **keys), split, seed, vocab_size), mbs, lambda _: gbs, rank, dp)


def rows(batches: list[MicroBatch]) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in batches])


def step_over_ranks(prefix: str, mbs: int, dp: int, position: int) -> torch.Tensor:
    """[global_batch_size, sequence_length] in the order of sample numbers."""
    ranks = [loader(prefix, mbs=mbs, rank=rank, dp=dp).step(position) for rank in range(dp)]
    return torch.cat([batch.tokens for micro in zip(*ranks, strict=True) for batch in micro])


def test_shapes_types_and_labels_are_the_next_tokens(prefix: str) -> None:
    batches = loader(prefix, mbs=3).step(0)
    assert len(batches) == 4
    for batch in batches:
        assert batch.tokens.shape == batch.labels.shape == (3, 7)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])


def test_an_epoch_predicts_every_token_but_the_first_once(prefix: str) -> None:
    one = loader(prefix, gbs=1)
    stream = split_documents(config(prefix))["train"].tokens
    assert one.source.samples_per_epoch == (len(stream) - 1) // 7
    seen = Counter(
        tuple(batch.labels[0].tolist()) for i in range(one.source.samples_per_epoch) for batch in one.step(i)
    )
    expected = Counter(tuple(stream[k * 7 + 1 : k * 7 + 8].tolist()) for k in range(one.source.samples_per_epoch))
    assert seen == expected


@pytest.mark.parametrize(("mbs", "dp"), [(1, 2), (2, 2), (3, 2), (1, 4), (6, 2), (12, 1)])
@pytest.mark.parametrize("position", [0, 24, 120, 132])  # 120 crosses into epoch 2, 132 is inside it
def test_batches_over_all_ranks_equal_those_of_one(prefix: str, mbs: int, dp: int, position: int) -> None:
    assert loader(prefix).source.samples_per_epoch == 128
    assert torch.equal(step_over_ranks(prefix, mbs, dp, position), rows(loader(prefix).step(position)))


@pytest.mark.parametrize("position", [36, 156])
def test_a_resumed_loader_gives_the_rest_of_the_uninterrupted_run(prefix: str, position: int) -> None:
    whole = torch.cat([rows(loader(prefix).step(at)) for at in range(0, 240, 12)])
    resumed = torch.cat([rows(loader(prefix).step(at)) for at in range(position, 240, 12)])
    assert torch.equal(resumed, whole[position:])
    assert not torch.equal(whole[:112], whole[128:240])


def test_seeds_give_other_orders(prefix: str) -> None:
    assert not torch.equal(rows(loader(prefix, seed=1).step(0)), rows(loader(prefix, seed=2).step(0)))


def test_prefetching_gives_the_same_steps(prefix: str) -> None:
    plain = loader(prefix)
    for at, batches in zip((24, 36, 48), prefetched(plain, 24), strict=False):
        assert torch.equal(rows(batches), rows(plain.step(at)))


def test_only_the_label_of_an_end_of_document_is_masked(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join('{"text": "0123456789"}\n' for _ in range(50)))
    build_dataset([str(source)], str(tmp_path / "b"), "bytes", workers=1)
    plain = loader(str(tmp_path / "b")).step(0)
    masked = loader(str(tmp_path / "b"), eod_mask_loss=True).step(0)
    for one, other in zip(plain, masked, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(torch.where(one.labels == EOD, IGNORE_INDEX, one.labels), other.labels)
    assert any((batch.labels == EOD).any() for batch in plain)


def test_the_end_of_document_of_a_foreign_dataset_comes_from_the_tokenizer(prefix: str) -> None:
    labels = torch.cat([batch.labels for batch in loader(prefix, eod_mask_loss=True, tokenizer="bytes").step(0)])
    assert (labels == IGNORE_INDEX).any()
    assert not (labels == EOD).any()


def test_validation_is_the_last_documents_and_train_the_rest(prefix: str) -> None:
    splits = split_documents(config(prefix))
    assert [(s.first_document, s.end_document) for s in splits.values()] == [(0, 90), (90, 100)]
    whole = TokenDataset(prefix).indexed.tokens.tolist()
    assert [*splits["train"].tokens.tolist(), *splits["validation"].tokens.tolist()] == whole


def test_a_validation_path_leaves_train_whole(prefix: str, write_dataset: Write) -> None:
    other = write_dataset("v", [[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    splits = split_documents(config(prefix, validation_path=other))
    assert splits["train"].end_document == 100
    assert splits["validation"].tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(("mbs", "dp"), [(1, 1), (3, 1), (4, 1), (1, 2), (2, 3), (4, 3)])
@pytest.mark.parametrize("samples", [1, 5, 12, 14, 1000])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_evaluation_labels_do_not_depend_on_the_layout(
    prefix: str, mbs: int, dp: int, samples: int, split: str
) -> None:
    def labels(mbs: int, dp: int) -> list[list[int]]:
        ranks = [list(loader(prefix, mbs, 12, rank, dp, split=split).evaluation(samples)) for rank in range(dp)]
        assert {len(batches) for batches in ranks} == {-(-count // (mbs * dp))}, "no micro-batch for nothing"
        found = torch.cat([batch.labels for micro in zip(*ranks, strict=True) for batch in micro])
        return [row for row in found.tolist() if row != [IGNORE_INDEX] * 7]

    count = min(samples, loader(prefix, split=split).source.samples_per_epoch)
    one = labels(1, 1)
    assert len(one) == count
    assert labels(mbs, dp) == one


def test_validation_keeps_the_order_of_the_file(prefix: str) -> None:
    stream = split_documents(config(prefix))["validation"].tokens
    found = rows(list(loader(prefix, split="validation").evaluation(14)))
    assert found.flatten().tolist() == stream[: 14 * 7].tolist()


def test_a_sequence_longer_than_the_data_is_refused_with_the_largest_legal_one(prefix: str) -> None:
    with pytest.raises(
        UserError, match=r"validation split .* 100 tokens .* a larger data\.validation_fraction"
    ) as refused:
        split_documents(config(prefix, sequence_length=100))
    assert re.search(r"largest legal: (\d+)$", str(refused.value)).group(1) == "99"  # type: ignore[union-attr]
    assert split_documents(config(prefix, sequence_length=99))
    with pytest.raises(UserError, match=r"train split .* has 1000 tokens"):
        split_documents(config(prefix, sequence_length=1000, validation_fraction=0))


def test_one_document_cannot_be_split(write_dataset: Write) -> None:
    single = write_dataset("s", [list(range(50))])
    with pytest.raises(UserError, match="validation_fraction=0"):
        split_documents(config(single))
    assert list(split_documents(config(single, validation_fraction=0))) == ["train"]
    with pytest.raises(UserError, match="no validation split"):
        loader(single, split="validation", validation_fraction=0)


@pytest.mark.parametrize("fraction", [1e-9, 0.999])
def test_no_fraction_leaves_a_split_without_documents(prefix: str, fraction: float) -> None:
    splits = split_documents(config(prefix, validation_fraction=fraction))
    assert all(split.end_document > split.first_document for split in splits.values())


def test_a_model_that_does_not_know_every_id_is_refused(prefix: str, tmp_path: Path) -> None:
    assert loader(prefix, vocab_size=257).step(0)
    with pytest.raises(UserError, match=r"model\.vocab_size=256 .* set model\.vocab_size=257"):
        loader(prefix, vocab_size=256)
    (tmp_path / "a.jsonl").write_text('{"text": "aaaaaaaaaaaa"}\n' * 20)
    build_dataset([str(tmp_path / "a.jsonl")], str(tmp_path / "b"), "bytes", workers=1)
    with pytest.raises(UserError, match=r"model\.vocab_size=200 is less than the 257 ids"):
        loader(str(tmp_path / "b"), vocab_size=200)


def test_negative_ids_are_refused(write_dataset: Write) -> None:
    with pytest.raises(UserError, match="negative id -1"):
        loader(write_dataset("n", [[1, -1] * 9], vocab_size=100_000), validation_fraction=0)


@pytest.mark.parametrize(
    ("found", "message"), [(300, r"vocab_size=257 does not cover the id 300 .*vocab_size=301"), (-7, "negative id -7")]
)
def test_an_unknown_id_far_into_a_large_dataset_is_refused_when_it_is_read(
    tmp_path: Path, found: int, message: str
) -> None:
    prefix = str(tmp_path / "large")
    sizes = np.array([SCANNED_TOKENS, 36], "<i4")
    with idx_path(prefix).open("x+b") as index:
        index.seek(HEADER.size)
        index.write(sizes.tobytes())
        finish_index(index, len(sizes), np.dtype("<i4"))
    with bin_path(prefix).open("wb") as file:  # zeros that take no space
        file.seek(4 * SCANNED_TOKENS)
        file.write(np.array([*range(30), found, *range(5)], "<i4").tobytes())
    samples = loader(prefix, split="validation").evaluation(5)
    for _ in range(4):
        assert next(samples).tokens.max() < 257
    with pytest.raises(UserError, match=message):
        next(samples)


def test_another_tokenizer_than_the_dataset_was_made_with_is_refused(tmp_path: Path) -> None:
    from megallama.text.tokenizer import tokenizer_from_ranks

    tokenizer_from_ranks({bytes([i]): i for i in range(256)}).save(tmp_path / "tok")
    (tmp_path / "a.jsonl").write_text('{"text": "aaaaaaaaaaaa"}\n' * 20)
    build_dataset([str(tmp_path / "a.jsonl")], str(tmp_path / "b"), str(tmp_path / "tok"), workers=1)
    assert loader(str(tmp_path / "b"), tokenizer=str(tmp_path / "tok")).step(0)
    with pytest.raises(UserError, match=r"data\.tokenizer=bytes is not the tokenizer"):
        loader(str(tmp_path / "b"))
    (tmp_path / "tok" / "megallama_tokenizer.json").write_text("null")
    with pytest.raises(UserError, match="is no JSON object"):
        loader(str(tmp_path / "b"), tokenizer=str(tmp_path / "tok"))


def test_the_fingerprint_tells_data_documents_and_length_apart(prefix: str, write_dataset: Write) -> None:
    same_sizes = write_dataset("e", [[7] * 10 for _ in range(100)])
    found = [
        loader(prefix),
        loader(same_sizes),
        loader(prefix, validation_fraction=0.2),
        loader(prefix, split="validation"),
    ]
    assert len({one.source.fingerprint(length) for one in found for length in (7, 8)}) == 2 * len(found)
    assert loader(prefix, sequence_length=8).source.fingerprint(7) == loader(prefix).source.fingerprint(7)
    assert loader(prefix, mbs=2, rank=1, dp=2, seed=9).source.fingerprint(7) == loader(prefix).source.fingerprint(7)


def test_a_missing_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; build the dataset"):
        loader(str(tmp_path / "missing"))


def test_the_data_package_knows_no_layer_above() -> None:
    code = (
        "import sys, megallama.data.loader, megallama.corpus.cli, megallama.corpus.train_tokenizer;"
        "above = {'megallama.parallel', 'megallama.model', 'megallama.train.engine', 'deepspeed'};"
        "sys.exit(bool(above & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_building_imports_no_torch() -> None:
    code = "import sys, megallama.corpus.building.build, megallama.corpus.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_steps_follow_one_another_without_gap(prefix: str) -> None:
    steps = [rows(loader(prefix, gbs=gbs).step(at)) for gbs, at in [(12, 0), (4, 12), (4, 16), (12, 20)]]
    assert torch.equal(torch.cat(steps), torch.cat([rows(loader(prefix, gbs=1).step(i)) for i in range(32)]))
