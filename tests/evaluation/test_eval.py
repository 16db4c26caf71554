"""`megallama eval`: every token counts once, with the context that it was promised, and bytes are those of the text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megallama.cli import app
from megallama.config.schema import IGNORE_INDEX
from megallama.corpus.building.build import build_dataset
from megallama.data.indexed import IndexedWriter
from megallama.errors import UserError
from megallama.evaluation.score import beginning, score, settings_for
from megallama.evaluation.texts import Text, read_texts
from megallama.evaluation.windows import stacked, windows
from megallama.generation.load import Loaded, load_model
from megallama.text.tokenizer import ByteTokenizer

SHORT = "document 7 is about the number 49"
LONG = "naïve text, 日本語 and 🙂, longer than a window of the model. " * 3


@pytest.fixture(scope="module")
def loaded(short_run: Path) -> Loaded:
    return load_model(short_run)


def write(folder: Path, *documents: str) -> str:
    path = folder / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    return str(path)


def measured(run: Path, *words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["eval", str(run), *words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def plainly(loaded: Loaded, ids: list[int], window: int, stride: int) -> list[float]:
    """Nats of each token but the first: the window that predicts it is found by counting, and computed for it alone."""
    found = []
    for place in range(1, len(ids)):
        end = window if place <= window else window + -(-(place - window) // stride) * stride
        begin = max(0, min(end, len(ids) - 1) - window)
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([ids[begin:place]]))[0, -1].float()
        found.append(float(F.cross_entropy(logits, torch.tensor(ids[place]))))
    return found


@settings(deadline=None)
@given(length=st.integers(0, 60), size=st.integers(1, 20), data=st.data())
def test_every_token_counts_once_with_its_context(length: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    ids, counted = list(range(length)), list[int]()
    for window in windows(ids, size, stride):
        read, predicted = window.tokens[:-1], window.tokens[len(window.tokens) - window.counted :]
        assert len(read) <= size
        assert predicted[0] <= size or predicted[0] - read[0] > size - stride
        counted += predicted
    assert counted == ids[1:]


def test_windows_are_filled_up_where_nothing_counts() -> None:
    tokens, labels = stacked(list(windows(list(range(10, 17)), 4, 2)))
    assert tokens.tolist() == [[10, 11, 12, 13], [12, 13, 14, 15]]
    assert labels.tolist() == [[11, 12, 13, 14], [IGNORE_INDEX, IGNORE_INDEX, 15, 16]]
    tokens, labels = stacked([*windows([1, 2, 3], 4, 2), *windows([5, 6], 4, 2)])
    assert tokens.tolist() == [[1, 2], [5, 0]]
    assert labels.tolist() == [[2, 3], [6, IGNORE_INDEX]]


@pytest.mark.parametrize("words", [(), ("--stride", "5"), ("--window", "20", "--stride", "20"), ("--batch-size", "1")])
def test_documents_alone_are_scored_as_by_hand(
    loaded: Loaded, short_run: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    found = measured(short_run, write(tmp_path, SHORT, LONG), *words)
    texts = [[*beginning(loaded), *loaded.tokenizer.encode(text)] for text in (SHORT, LONG)]
    nats = [each for ids in texts for each in plainly(loaded, ids, found["window"], found["stride"])]
    assert (found["documents"], found["tokens"]) == (2, len(nats))
    assert found["bytes"] == len((SHORT + LONG).encode())
    assert found["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / found["bytes"], rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_bits_are_per_byte_of_the_text_and_not_per_token(loaded: Loaded, packed: bool) -> None:
    texts = [Text(loaded.tokenizer.encode("number"), 11), Text(loaded.tokenizer.encode("49"), 5)]
    found = score(loaded, texts, settings_for(loaded, None, None, packed, 8), lambda _: None)
    assert (found.tokens, found.bytes) == (8 + 2 * packed, 16)
    assert found.as_dict()["bits_per_byte"] == pytest.approx(found.loss * found.tokens / math.log(2) / 16)


def test_packed_documents_follow_each_other_as_in_training(loaded: Loaded, short_run: Path, tmp_path: Path) -> None:
    found = measured(short_run, write(tmp_path, SHORT, LONG), "--packed")
    eod, encode = loaded.tokenizer.eod_id, loaded.tokenizer.encode
    nats = plainly(loaded, [eod, *encode(SHORT), eod, *encode(LONG), eod], found["window"], found["stride"])
    assert found["tokens"] == len(nats)
    assert found["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_a_dataset_is_its_text(short_run: Path, tmp_path: Path) -> None:
    text, prefix = write(tmp_path, SHORT, LONG, SHORT), str(tmp_path / "built")
    build_dataset([text], prefix, "bytes", workers=1)
    figures = [measured(short_run, data, "--limit", "2") for data in (text, prefix)]
    for found in figures:
        del found["data"]
    assert figures[0] == figures[1]
    assert figures[0]["documents"] == 2


def write_dataset(folder: Path, name: str, *rows: list[int]) -> str:
    """One without a description, as other tools write it."""
    writer = IndexedWriter(str(folder / name), np.dtype("<i4"))
    for row in rows:
        writer.add(np.array(row, "<i4"), np.array([len(row)], "<i4"))
    writer.close()
    return str(folder / name)


def test_ends_inside_a_row_of_a_dataset_are_no_text(loaded: Loaded, short_run: Path, tmp_path: Path) -> None:
    text, eod = loaded.tokenizer.encode(LONG), loaded.tokenizer.eod_id
    figures = [
        measured(short_run, write_dataset(tmp_path, "apart", [*text, eod], [*text, eod])),
        measured(short_run, write_dataset(tmp_path, "together", [eod, *text, eod, eod, *text])),
    ]
    for found in figures:
        del found["data"]
    assert figures[0] == figures[1]
    assert (figures[0]["documents"], figures[0]["bytes"]) == (2, 2 * len(LONG.encode()))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([104, 999, 256], "holds the id 999, and the model's tokenizer has the ids 0 to 256"),
        ([104, -1, 256], "holds the id -1, and the model's tokenizer has the ids 0 to 256"),
        ([256, 256], "has no text"),
    ],
)
def test_rows_that_are_no_text(short_run: Path, tmp_path: Path, row: list[int], said: str) -> None:
    done = CliRunner().invoke(app, ["eval", str(short_run), write_dataset(tmp_path, "rows", row)])
    assert said in str(done.exception)


def test_ids_of_a_padded_vocabulary_are_refused(tmp_path: Path) -> None:
    rows = read_texts(write_dataset(tmp_path, "padding", [104, 257]), ByteTokenizer())
    with pytest.raises(UserError, match="holds the id 257"):
        list(rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.txt"], "source missing.txt does not exist"),
        (["empty.jsonl"], "empty.jsonl has no text"),
        (["text.jsonl", "--window", "999"], "--window 999 is beyond the 64 positions of the model; use at most 64"),
        (["text.jsonl", "--window", "8", "--stride", "9"], "--stride 9 would leave tokens out between windows of 8"),
        (["other.bin"], "other.bin is a file of a dataset; name its prefix, other"),
        (["other"], "other was built with the tokenizer"),
    ],
)
def test_what_cannot_be_scored(
    short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, SHORT)
    Path("empty.jsonl").write_text('{"text": ""}\n')
    if words[0].startswith("other"):
        from megallama.corpus.train_tokenizer import train_tokenizer

        train_tokenizer(["text.jsonl"], "trained", 258)
        build_dataset(["text.jsonl"], "other", "trained", workers=1)
    done = CliRunner().invoke(app, ["eval", str(short_run), *words])
    assert said in str(done.exception)
