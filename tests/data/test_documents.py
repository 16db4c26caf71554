"""`data.pack: one`: a document per sample, each once in an epoch; what fills up a sample counts nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megallama.config.data_keys import DataConfig
from megallama.config.schema import IGNORE_INDEX
from megallama.data.loader import Loader
from megallama.data.source import open_source
from megallama.errors import UserError
from tests.launching import arguments, events, pretrain

EOD, LENGTH = 256, 6
DOCUMENTS = [[*range(10 * number, 10 * number + number), EOD] for number in range(1, 9)]


@pytest.fixture
def config(write_dataset: Callable[..., str]) -> DataConfig:
    prefix = write_dataset("d", DOCUMENTS)
    return DataConfig(path=prefix, sequence_length=LENGTH, validation_fraction=0.25, pack="one")


def rows(config: DataConfig, split: str = "train", samples: int = 6) -> list[tuple[list[int], list[int]]]:
    loader = Loader(open_source(config, "train" if split == "train" else "validation", 5, 257), 1, lambda _: 1)
    batches = [loader.step(number)[0] for number in range(samples)]
    return [(batch.tokens[0].tolist(), batch.labels[0].tolist()) for batch in batches]


def whole(document: list[int]) -> tuple[list[int], list[int]]:
    seen, left = [EOD, *document][:LENGTH], LENGTH - len(document)
    return seen + [0] * (LENGTH - len(seen)), document[:LENGTH] + [IGNORE_INDEX] * left


def test_a_sample_is_a_document_behind_the_end_of_another(config: DataConfig) -> None:
    found = rows(config, "validation", samples=2)
    assert found == [whole(DOCUMENTS[6]), whole(DOCUMENTS[7])]
    assert found[0][1] == [70, 71, 72, 73, 74, 75]  # its end is cut off


def test_every_document_comes_once_in_an_epoch_in_an_order_of_its_own(config: DataConfig) -> None:
    found = rows(config, samples=12)
    for epoch in (found[:6], found[6:]):
        assert sorted(epoch) == sorted(whole(document) for document in DOCUMENTS[:6])
    assert found[:6] != found[6:] != [whole(document) for document in DOCUMENTS[:6]]


def test_documents_without_a_token_are_no_samples(config: DataConfig, write_dataset: Callable[..., str]) -> None:
    empty: list[int] = []
    holey = [empty, *DOCUMENTS[:3], empty, empty, *DOCUMENTS[3:6], empty, DOCUMENTS[6], empty, DOCUMENTS[7], empty]
    prefix = write_dataset("holey", holey)
    with_holes = config.model_copy(update={"path": prefix, "validation_fraction": 4 / 14})
    assert rows(with_holes, samples=12) == rows(config, samples=12)
    assert rows(with_holes, "validation", 4) == rows(config, "validation", 4)
    source = open_source(with_holes, "train", 5, 257)
    assert source.samples_per_epoch == 6
    assert source.fingerprint(LENGTH) != open_source(config, "train", 5, 257).fingerprint(LENGTH)
    with pytest.raises(UserError, match=r"the validation split of .*holey has no tokens"):
        open_source(with_holes.model_copy(update={"validation_fraction": 1 / 14}), "train", 5, 257)


def test_samples_of_documents_are_other_data_than_windows(config: DataConfig) -> None:
    windows = open_source(config.model_copy(update={"pack": "all"}), "train", 5, 257)
    assert open_source(config, "train", 5, 257).fingerprint(LENGTH) != windows.fingerprint(LENGTH)


def test_what_ends_documents_is_left_out_of_the_loss_where_asked(config: DataConfig) -> None:
    masked = rows(config.model_copy(update={"eod_mask_loss": True}))
    assert all(EOD not in labels for _, labels in masked)
    assert sum(label != IGNORE_INDEX for _, labels in masked for label in labels) == 1 + 2 + 3 + 4 + 5 + 6


def test_the_loss_is_the_mean_over_the_tokens_of_documents_at_every_layout(byte_dataset: str, tmp_path: Path) -> None:
    """Documents of unequal length on two ranks: a mean of means would differ."""
    found = []
    for name, ranks in (("one", 1), ("two", 2)):
        words = ["data.pack=one", "data.sequence_length=140", "model.max_position_embeddings=140"]
        words += ["train.dtype=fp32", "evaluation.every=0"]
        assert pretrain(ranks, arguments(byte_dataset, tmp_path / name, *words)) == [(0, "")] * ranks
        found.append([event["loss"] for event in events(tmp_path / name, "train")])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert all(math.isfinite(loss) for loss in found[0])


def test_a_step_in_which_no_label_counts_has_a_loss_of_0(write_dataset: Callable[..., str], tmp_path: Path) -> None:
    """Four documents of twelve are more than an end: of six steps of two samples, two or more are ends alone."""
    prefix = write_dataset("ends", [[*range(number, number + 9), EOD] if number < 4 else [EOD] for number in range(12)])
    words = ["data.pack=one", "data.eod_mask_loss=true", "evaluation.samples=12", "train.steps=6"]
    words += ["train.micro_batch_size=1", "train.global_batch_size=2", "data.validation_fraction=0"]
    found = []
    for ranks, layout in ((1, []), (2, []), (2, ["parallel.pipeline=2"]), (1, ["zero.stage=3", "train.dtype=bf16"])):
        run_dir = tmp_path / f"run-{len(found)}"
        assert pretrain(ranks, arguments(prefix, run_dir, *words, *layout)) == [(0, "")] * ranks
        found.append([(event["loss"], event["grad_norm"]) for event in events(run_dir, "train")])
        assert not events(run_dir, "skip")
    for steps in found:
        assert [step == (0.0, 0.0) for step in steps] == [step == (0.0, 0.0) for step in found[0]]
        assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in found[0]], rel=0.01)
    assert {(0.0, 0.0)} < set(found[0])


def test_a_position_in_documents_is_that_of_one_length(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", "data.pack=one", "train.stop_after=2")
    assert pretrain(1, words) == [(0, "")]
    ((code, said),) = pretrain(1, [*words, "data.sequence_length=16", "train.stop_after=3"])
    assert code == 2
    assert "data.sequence_length=16 differs from 32 in the checkpoint" in said


def test_the_end_of_a_document_needs_a_row_of_the_model(write_dataset: Callable[..., str]) -> None:
    """Also where no document of the data has one."""
    config = DataConfig(path=write_dataset("d", [[1, 2, 3]] * 4), sequence_length=LENGTH, pack="one")
    with pytest.raises(UserError, match=r"does not cover it; set model\.vocab_size=257"):
        open_source(config, "train", 5, 256)


def test_an_evaluation_in_which_nothing_counts_is_refused(
    byte_dataset: str, write_dataset: Callable[..., str], tmp_path: Path
) -> None:
    ends = write_dataset("ends", [[EOD]] * 4)
    more = ["data.pack=one", "data.eod_mask_loss=true", f"evaluation.sets.ends={ends}"]
    ((code, said),) = pretrain(1, arguments(byte_dataset, tmp_path / "run", *more))
    assert code == 2
    assert "no token of what is evaluated counts" in said


def test_a_masked_run_has_no_such_samples(byte_dataset: str, tmp_path: Path) -> None:
    words = ["data.pack=one", "train.objective=masked", "model.vocab_size=258"]
    ((code, said),) = pretrain(1, arguments(byte_dataset, tmp_path / "run", *words))
    assert code == 2
    assert "use data.pack=all" in said
