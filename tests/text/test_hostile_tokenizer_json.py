"""tokenizer.json and what stands beside it, changed in every way: refused in a sentence, or read as what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megallama.errors import UserError
from megallama.text.hf_tokenizer import HuggingFaceTokenizer, save_hugging_face
from megallama.text.tokenizer import load_tokenizer, tokenizer_from_ranks
from tests.corpus.mutating import EDGES, PATTERNS, VALUES, Files, Mutation, bytes_changed, file_replaced, json_changed
from tests.corpus.test_hostile_files import SAMPLE, lay_out, told

RULES, CONFIG = "tokenizer.json", "tokenizer_config.json"
SECTIONS = [
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
    "truncation",
    "padding",
]
RANKS = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b"  ": 258, b"xx": 259}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Files:
    place = tmp_path_factory.mktemp("model")
    save_hugging_face(tokenizer_from_ranks(RANKS), place)
    return {name: (place / name).read_bytes() for name in (RULES, CONFIG)}


@st.composite
def rules_changed(draw: st.DrawFn) -> Mutation:
    """A value somewhere in tokenizer.json is another: on a random way down through objects and lists."""
    way = draw(st.lists(st.integers(0, 300), min_size=1, max_size=6))
    split = {"type": "Split", "pattern": {"Regex": draw(st.sampled_from(PATTERNS))}, "behavior": "Isolated"}
    value = draw(st.sampled_from([*VALUES, *EDGES, split | {"invert": False}]))

    def change(files: Files) -> None:
        try:
            tree: Any = json.loads(files[RULES])
        except (ValueError, RecursionError):
            return
        at = tree
        for turn in way:
            keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
            if not keys:
                break
            key = keys[turn % len(keys)]
            if turn is way[-1] or not isinstance(at[key], dict | list) or not at[key]:
                at[key] = value
                break
            at = at[key]
        files[RULES] = json.dumps(tree).encode()

    return change


CHANGES = st.lists(
    st.one_of(
        rules_changed(),
        rules_changed(),
        json_changed(RULES, SECTIONS),
        json_changed(CONFIG, ["eos_token", "tokenizer_class"]),
        bytes_changed(RULES, CONFIG),
        file_replaced(RULES, CONFIG),
    ),
    min_size=1,
    max_size=2,
)


@settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(changes=CHANGES)
def test_a_folder_of_a_model_is_refused_or_gives_ids(changes: list[Mutation], folder: Files, tmp_path: Path) -> None:
    files = dict(folder)
    for change in changes:
        if {RULES, CONFIG} <= set(files):
            change(files)
    lay_out(tmp_path / "t", files)
    spec = f"hf:{tmp_path}/t"
    if told("tokenizer", "info", spec) is None:
        return
    tokenizer = load_tokenizer(spec)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size < 2**31
    try:
        ids = tokenizer.encode(SAMPLE)
    except UserError:
        return
    assert all(0 <= number < tokenizer.vocab_size for number in ids)
    assert isinstance(tokenizer.decode([*ids, tokenizer.eod_id]), str)
    tokenizer.save(tmp_path / "t" / "again")
    again = load_tokenizer(str(tmp_path / "t" / "again"))
    assert (again.fingerprint, again.encode(SAMPLE)) == (tokenizer.fingerprint, ids)
