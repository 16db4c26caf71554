"""`data.document_mask`: documents are found in the index; and what `data.pack: one` keeps, fills up and leaves out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.config.data_keys import DataConfig
from megallama.config.load import load_config
from megallama.config.schema import IGNORE_INDEX
from megallama.data.loader import Loader, MicroBatch, open_data
from megallama.data.source import open_source
from megallama.errors import UserError
from megallama.layout.check import check_config
from megallama.layout.topology import Topology
from tests.launching import arguments, events, losses, pretrain

Write = Callable[..., str]
EOD, LENGTH = 256, 6
SIZES = [4, 0, 3, 0, 0, 1, 22, 5, 2, 1]
"""Of documents without an end-of-document id; some are empty, and one is longer than three samples."""
STREAM = [(document, token) for document, size in enumerate(SIZES) for token in range(size)]


def foreign(write_dataset: Write) -> str:
    return write_dataset("foreign", [[10 * document + token for token in range(n)] for document, n in enumerate(SIZES)])


def samples(path: str, mask: bool = True, count: int | None = None, **keys: Any) -> list[MicroBatch]:
    """Of the validation split: in the order of the file."""
    config = DataConfig(path=path, validation_path=path, sequence_length=LENGTH, **keys)
    source = open_source(config, "validation", 5, 257)
    loader = Loader(source, 1, lambda _: 1, document_mask=mask or config.documents_apart)
    return [loader.step(number)[0] for number in range(count or source.samples_per_epoch)]


def test_documents_are_those_of_the_index(write_dataset: Write) -> None:
    found = samples(foreign(write_dataset))
    assert len(found) == (len(STREAM) - 1) // LENGTH
    for number, batch in enumerate(found):
        window = STREAM[number * LENGTH : number * LENGTH + LENGTH + 1]
        present = list(dict.fromkeys(document for document, _ in window))
        assert batch.documents is not None
        assert batch.documents[0].tolist() == [present.index(document) for document, _ in window[:-1]]
        expected = [10 * new + token if new == old else IGNORE_INDEX for (old, _), (new, token) in pairwise(window)]
        assert batch.labels[0].tolist() == expected
    within = [batch for batch in found if batch.labels.min() > IGNORE_INDEX]
    assert len(within) == 2, "samples inside the long document, which see all that they see without a mask"
    assert samples(foreign(write_dataset), mask=False)[0].documents is None


def test_a_split_that_begins_in_the_middle_has_its_own_documents(write_dataset: Write) -> None:
    config = DataConfig(path=foreign(write_dataset), validation_fraction=0.4, sequence_length=4)
    source = open_source(config, "validation", 5, 257)
    assert source.documents(0).tolist() == [0] * 5
    stream = [document for document, _ in STREAM if document >= 6]
    for number in range(source.samples_per_epoch):
        window = stream[4 * number : 4 * number + 5]
        present = list(dict.fromkeys(window))
        assert source.documents(number).tolist() == [present.index(document) for document in window]


def test_a_masked_run_sees_documents_as_well(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path, "data.document_mask=true", "model.vocab_size=258")
    causal, masked = (
        open_data(load_config(words[1], [*words[2:], f"train.objective={name}"]), Topology(), 0).train.step(0)
        for name in ("causal", "masked")
    )
    for mine, theirs in zip(causal, masked, strict=True):
        assert mine.documents is not None and theirs.documents is not None
        assert torch.equal(mine.documents, theirs.documents)
        assert int(mine.documents.max()) > 0


SHORT, FITTING, LONG = [1, 2, 3], [11, 12, 13, 14, 15, 16], [*range(21, 30)]
RIGHT = ([EOD, 1, 2, 3, 0, 0], [1, 2, 3, *[IGNORE_INDEX] * 3], None)
LEFT = ([0, 0, 0, EOD, 1, 2], [*[IGNORE_INDEX] * 3, 1, 2, 3], [1, 1, 1, 0, 0, 0])
FIRST = ([EOD, 21, 22, 23, 24, 25], [21, 22, 23, 24, 25, 26])
LAST = ([23, 24, 25, 26, 27, 28], [24, 25, 26, 27, 28, 29])


@pytest.mark.parametrize(("truncate", "kept"), [("first", FIRST), ("last", LAST)])
@pytest.mark.parametrize(("pad", "filled"), [("right", RIGHT), ("left", LEFT)])
def test_a_document_is_cut_off_and_filled_up_where_asked(
    truncate: str, pad: str, kept: tuple[Any, ...], filled: tuple[Any, ...], write_dataset: Write
) -> None:
    prefix = write_dataset("d", [SHORT, FITTING, LONG])
    found = samples(prefix, mask=False, pack="one", truncate=truncate, pad=pad)
    rows = [(batch.tokens[0].tolist(), batch.labels[0].tolist()) for batch in found]
    assert rows == [filled[:2], ([EOD, *FITTING[:5]], FITTING), kept]
    alone = [None if batch.documents is None else batch.documents[0].tolist() for batch in found]
    assert alone == [filled[2], *[None if pad == "right" else [0] * LENGTH] * 2]


def test_what_is_left_out_is_counted(write_dataset: Write) -> None:
    prefix = foreign(write_dataset)
    config = DataConfig(path=prefix, validation_fraction=0, sequence_length=LENGTH)
    one = config.model_copy(update={"pack": "one"})
    assert open_source(config, "train", 5, 257).left_out == (1, 1, 0), "38 tokens: six windows and one more"
    assert open_source(one, "train", 5, 257).left_out == (16, 1, 3)
    longer = config.model_copy(update={"sequence_length": 5})
    assert open_source(longer, "train", 5, 257).left_out == (2, 2, 0)
    whole = config.model_copy(update={"sequence_length": 37})
    assert open_source(whole, "train", 5, 257).left_out == (0, 0, 0)


def test_a_run_says_what_it_leaves_out(byte_dataset: str, tmp_path: Path) -> None:
    keys = ["data.pack=one", "data.truncate=last", "data.pad=left", "train.stop_after=1", "evaluation.every=0"]
    words = arguments(byte_dataset, tmp_path / "run", *keys)
    assert pretrain(1, words) == [(0, "")]
    config = load_config(words[1], words[2:])
    texts = [event["text"] for event in events(tmp_path / "run", "notice")]
    for text, split in zip(texts, ("train", "validation"), strict=True):
        tokens, documents, _ = open_source(config.data, "train" if split == "train" else "validation", 1, 257).left_out
        assert documents == {"train": 48, "validation": 12}[split], "all are longer"
        kept = "data.truncate=last at data.sequence_length=32"
        assert text == f"{kept} leaves {tokens:,} tokens of {documents} documents out of the {split} split"


@pytest.mark.parametrize(
    ("keys", "other"),
    [
        ([], ["data.document_mask=true"]),
        (["data.pack=one"], ["data.document_mask=true"]),
        (["data.pack=one"], ["data.truncate=last"]),
        (["data.pack=one"], ["data.pad=left"]),
    ],
    ids=lambda keys: " ".join(keys),
)
def test_a_position_is_that_of_one_kind_of_samples(
    keys: list[str], other: list[str], byte_dataset: str, tmp_path: Path
) -> None:
    def identity(*more: str) -> str:
        words = arguments(byte_dataset, tmp_path, *keys, *more)
        return open_data(load_config(words[1], words[2:]), Topology(), 0).train.fingerprint(32)

    assert identity() != identity(*other) == identity(*other)


def test_a_run_within_documents_goes_on_as_if_it_had_not_stopped(byte_dataset: str, tmp_path: Path) -> None:
    mask = "data.document_mask=true"
    for name, more in (("whole", [mask]), ("parts", [mask, "train.stop_after=2"]), ("parts", [mask])):
        assert pretrain(1, arguments(byte_dataset, tmp_path / name, *more)) == [(0, "")]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ((code, said),) = pretrain(1, arguments(byte_dataset, tmp_path / "parts", "train.stop_after=4"))
    assert code == 2
    assert "data.document_mask, data.truncate, data.pad or the split) is not that of the checkpoint" in said


@pytest.mark.parametrize("key", ["truncate=last", "pad=left"])
def test_keys_of_one_document_are_refused_where_all_are_in_a_row(key: str) -> None:
    name, value = key.split("=")
    with pytest.raises(UserError, match=rf"data\.{name}={value} is for data\.pack=one: .*; use data\.pack=one"):
        check_config(load_config("configs/debug.yaml", [f"data.{key}"]), 1)
    check_config(load_config("configs/debug.yaml", [f"data.{key}", "data.pack=one"]), 1)
