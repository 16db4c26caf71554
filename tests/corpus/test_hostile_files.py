"""Datasets and tokenizer folders changed in every way: each is refused in a sentence, or read as what it says.

The index is also read here by integers of any size, from the table in docs/data.md: whatever a command accepts has to
be what that reader finds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megallama.cli import app
from megallama.config.data_keys import DataConfig
from megallama.corpus.building.build import build_dataset
from megallama.data.dataset import TokenDataset
from megallama.data.indexed import open_indexed
from megallama.data.loader import Loader
from megallama.data.source import open_source
from megallama.errors import UserError
from megallama.text.rank_file import rank_lines
from megallama.text.tokenizer import load_tokenizer, tokenizer_from_ranks
from tests.corpus.mutating import (
    EDGES,
    VALUES,
    WIDTHS,
    Files,
    Mutation,
    bytes_changed,
    file_replaced,
    integers_changed,
    json_changed,
)

EXAMPLES = 80
"""Of each of the two kinds."""
hostile = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def lay_out(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        kind, _, rest = name.partition(":")
        if kind == "fifo":
            os.mkfifo(folder / rest)
        elif kind == "dir":
            (folder / rest).mkdir()
        else:
            (folder / name).write_bytes(content)


def told(*words: str) -> dict[str, Any] | None:
    """What a command prints, or None where it refuses in one sentence: then `main` leaves with 2."""
    result = CliRunner().invoke(app, [*words, "--json"])
    if isinstance(result.exception, UserError):
        assert "\n" not in str(result.exception), result.exception
        return None
    assert result.exit_code == 0, result.exc_info
    found: dict[str, Any] = json.loads(result.output)
    return found


# --- datasets


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Eight documents of bytes."""
    folder = tmp_path_factory.mktemp("dataset")
    lines = [json.dumps({"text": f"document {number} " * number}) for number in range(1, 9)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    build_dataset([str(folder / "a.jsonl")], str(folder / "X"), "bytes", workers=1)
    return {name: (folder / name).read_bytes() for name in ("X.bin", "X.idx", "X.json")}


INFO_KEYS = ["tokenizer", "fingerprint", "vocab_size", "eod_id", "documents", "tokens", "sources", "inputs"]
DATASET_CHANGES = st.lists(
    st.one_of(
        integers_changed(),
        bytes_changed("X.bin", "X.idx", "X.json"),
        json_changed("X.json", INFO_KEYS),
        file_replaced("X.bin", "X.idx", "X.json"),
    ),
    min_size=1,
    max_size=3,
)


def documents_of(files: Files) -> list[list[int]]:
    """By the table of docs/data.md and nothing else."""
    index, content = files["X.idx"], files["X.bin"]
    magic, version, code, sequences, entries = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    width, signed = WIDTHS[code]
    sizes = struct.unpack_from(f"<{sequences}i", index, 34)
    offsets = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    first = struct.unpack_from(f"<{entries}q", index, 34 + 12 * sequences)
    assert len(index) - (34 + 12 * sequences + 8 * entries) in (0, sequences)
    assert sum(sizes) * width == len(content)
    assert (first[0], first[-1]) == (0, sequences)
    found = []
    for begin, end in pairwise(first):
        assert 0 <= begin <= end <= sequences
        ids: list[int] = []
        for offset, size in zip(offsets[begin:end], sizes[begin:end], strict=True):
            assert size >= 0
            assert offset % width == 0
            assert 0 <= offset <= offset + size * width <= len(content)
            ids += [
                int.from_bytes(content[at : at + width], "little", signed=signed)
                for at in range(offset, offset + size * width, width)
            ]
        found.append(ids)
    return found


@hostile
@given(changes=DATASET_CHANGES)
def test_a_dataset_is_refused_or_is_what_its_index_says(
    changes: list[Mutation], dataset: Files, tmp_path: Path
) -> None:
    files = dict(dataset)
    for change in changes:
        if {"X.idx", "X.bin", "X.json"} <= set(files):
            change(files)
    lay_out(tmp_path / "d", files)
    prefix = str(tmp_path / "d" / "X")
    said = told("data", "info", prefix)
    rows = trained_on(prefix)
    if said is None:
        assert rows is None, "what is no dataset is not trained on"
        return
    expected = documents_of(files)
    found = open_indexed(prefix)
    assert [found.document(number).tolist() for number in range(found.num_documents)] == expected
    assert (said["documents"], said["tokens"]) == (len(expected), sum(map(len, expected)))
    if (info := TokenDataset(prefix).info) is not None:
        assert (info.documents, info.tokens) == (said["documents"], said["tokens"])
        assert 0 <= info.eod_id < info.vocab_size
    if rows is not None:
        stream = [number for document in expected for number in document]
        windows = {tuple(stream[start : start + 17]) for start in range(0, len(stream), 16)}
        assert set(rows) <= windows


def trained_on(prefix: str) -> list[tuple[int, ...]] | None:
    """The samples of a step and of an evaluation; None where the data is refused."""
    config = DataConfig(path=prefix, sequence_length=16, validation_fraction=0.0, eod_mask_loss=True)
    try:
        loader = Loader(open_source(config, "train", 3, 300), 2, lambda _: 4)
        assert loader.source.content_hash
        batches = [*loader.step(0), *loader.step(10**12), *loader.evaluation(3)]
    except UserError:
        return None
    return [
        (*tokens, *labels[-1:])
        for batch in batches
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
        if labels[-1] >= 0
    ]


def test_documents_that_wrap_around_are_refused(dataset: Files, tmp_path: Path) -> None:
    """Differences of these, in 64 bits, are all positive."""
    files = dict(dataset)
    content = bytearray(files["X.idx"])
    content[-64:-48] = struct.pack("<qq", 2**62 + 1, -(2**62))
    files["X.idx"] = bytes(content)
    lay_out(tmp_path / "d", files)
    with pytest.raises(UserError, match="out of order"):
        open_indexed(str(tmp_path / "d" / "X"))


def test_a_description_of_another_build_is_refused(dataset: Files, tmp_path: Path) -> None:
    files = dict(dataset)
    files["X.json"] = json.dumps(json.loads(files["X.json"]) | {"documents": 9}).encode()
    lay_out(tmp_path / "d", files)
    with pytest.raises(UserError, match=r"X\.json is of another build .* says 9 documents of .*, the index has 8 of "):
        TokenDataset(str(tmp_path / "d" / "X"))


# --- tokenizer folders

RANKS, SIDECAR = "ranks.tiktoken", "megallama_tokenizer.json"
SAMPLE = "the words in the café\n\n\t 12 <|endoftext|> xxxxxxxxxxxxxxxxxxxxxxxxxxxx \x00 日本"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Bytes, seven merges and the end of a document."""
    merges = [b"th", b"the", b" the", b"in", b"\n\n", b"  ", b"xx"]
    ranks = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
    place = tmp_path_factory.mktemp("tokenizer")
    tokenizer_from_ranks(ranks).save(place)
    return {name: (place / name).read_bytes() for name in (RANKS, SIDECAR)}


@st.composite
def special_changed(draw: st.DrawFn) -> Mutation:
    name, number = draw(st.sampled_from(["<|endoftext|>", "", "a", "\ud800"])), draw(st.sampled_from([*EDGES, *VALUES]))

    def change(files: Files) -> None:
        try:
            tree = json.loads(files[SIDECAR])
            tree["special_tokens"][name] = number
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        files[SIDECAR] = json.dumps(tree).encode()

    return change


@st.composite
def ranks_changed(draw: st.DrawFn) -> Mutation:
    line, how = draw(st.integers(0, 262)), draw(st.sampled_from(["drop", "twice", "rank", "token"]))
    number = draw(st.sampled_from(EDGES))

    def change(files: Files) -> None:
        lines = files[RANKS].splitlines(keepends=True)
        at = line % max(len(lines), 1)
        word = lines[at].split() if lines else []
        if len(word) == 2:
            changed = {
                "drop": [],
                "twice": [lines[at]] * 2,
                "rank": [word[0] + b" %d\n" % number],
                "token": [b"/" * 4000 + b" " + word[1] + b"\n"],
            }
            files[RANKS] = b"".join([*lines[:at], *changed[how], *lines[at + 1 :]])

    return change


def sealed(files: Files) -> Files:
    """With the fingerprint that the folder would have if it had been saved so, where it can be computed."""
    try:
        tree = json.loads(files[SIDECAR])
        rules = {name: tree[name] for name in ("pattern", "special_tokens", "end_of_document")}
        ranks = {}
        for line in files[RANKS].splitlines():
            token, rank = line.split()
            ranks[token] = int(rank)
        ordered = b"".join(token + b" %d\n" % ranks[token] for token in sorted(ranks, key=lambda token: ranks[token]))
        digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode() + ordered)
    except (ValueError, KeyError, TypeError, RecursionError):
        return files
    return files | {SIDECAR: json.dumps(tree | {"fingerprint": digest.hexdigest()}).encode()}


FOLDER_CHANGES = st.lists(
    st.one_of(
        special_changed(),
        ranks_changed(),
        json_changed(SIDECAR, ["pattern", "special_tokens", "end_of_document", "format", "fingerprint"]),
        bytes_changed(RANKS, SIDECAR),
        file_replaced(RANKS, SIDECAR),
    ),
    min_size=1,
    max_size=3,
)


@hostile
@given(changes=FOLDER_CHANGES)
def test_a_tokenizer_is_refused_or_keeps_all_text(changes: list[Mutation], folder: Files, tmp_path: Path) -> None:
    files = dict(folder)
    for change in changes:
        if {RANKS, SIDECAR} <= set(files):
            change(files)
    lay_out(tmp_path / "t", sealed(files))
    said = told("tokenizer", "info", str(tmp_path / "t"))
    if said is None:
        return
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size < 2**31
    ids = tokenizer.encode(SAMPLE)
    assert all(0 <= number < tokenizer.vocab_size and number != tokenizer.eod_id for number in ids)
    assert tokenizer.decode(ids) == SAMPLE
    tokenizer.save(tmp_path / "t" / "again")
    assert load_tokenizer(str(tmp_path / "t" / "again")).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"pattern": "(open"}, "the pattern '(open' is not legal (Parsing error"),
        ({"pattern": "(x+x+)+y(?=z)|\\s|."}, "the pattern .* backtracks without end"),
        ({"pattern": "\\p{L}+"}, "the pattern .* passes over a part of "),
        ({"pattern": 3}, "the pattern is no text"),
        (
            {"special_tokens": {"<|endoftext|>": -1}},
            "the id of '<|endoftext|>' is no whole number from 0 to 2147",
        ),
        ({"special_tokens": {"<|endoftext|>": 2**31}}, "the id of '<|endoftext|>' is no whole number from 0 to "),
        ({"special_tokens": {"<|endoftext|>": 5}}, "the id 5 of the special token '<|endoftext|>' is that of another"),
        ({"special_tokens": {}}, "its special tokens do not hold its end of document '<|endoftext|>'"),
        ({"end_of_document": None}, "its special tokens do not hold its end of document 'None'"),
    ],
)
def test_a_sealed_rule_that_cannot_be_is_refused(
    damage: dict[str, Any], sentence: str, folder: Files, tmp_path: Path
) -> None:
    files = dict(folder)
    files[SIDECAR] = json.dumps(json.loads(files[SIDECAR]) | damage).encode()
    lay_out(tmp_path / "t", sealed(files))
    with pytest.raises(UserError) as refusal:
        load_tokenizer(str(tmp_path / "t"))
    begin, _, rest = sentence.partition(".*")
    assert str(refusal.value).startswith(f"tokenizer folder {tmp_path}/t is damaged: {begin}")
    assert rest.strip() in str(refusal.value)


def test_gaps_between_ids_are_legal_in_a_folder(tmp_path: Path) -> None:
    """As p50k_base has them: its end of document stands between two ranks."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 257}
    tokenizer_from_ranks(ranks | {b"in": 259}).save(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in (RANKS, SIDECAR)}
    files[SIDECAR] = json.dumps(json.loads(files[SIDECAR]) | {"special_tokens": {"<|endoftext|>": 256}}).encode()
    lay_out(tmp_path / "t", sealed(files))
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert (tokenizer.eod_id, tokenizer.vocab_size, tokenizer.encode("thin")) == (256, 260, [257, 259])
    assert rank_lines(ranks) in files[RANKS]
