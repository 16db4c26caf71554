"""AutoTokenizer of transformers gives the ids of our tokenizers, of each kind, on any text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from transformers import AutoTokenizer

from megallama.corpus.train_tokenizer import learn_ranks
from megallama.text.hf_tokenizer import save_hugging_face
from megallama.text.rank_file import rank_lines
from megallama.text.split_pattern import LLAMA3_PATTERN
from megallama.text.tokenizer import (
    LONGEST_RUN,
    ByteTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_ranks,
)

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = "naïve ÀÉÎ straße Ωμέγα Привет мир こんにちは世界 日本語 한국어 العربية עברית हिन्दी ไทย ²½٣٤Ⅷ "
SCRIPTS += "\u017f \u212a e\u0301 🙂 \U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7"
SOURCES = [*(ROOT / "megallama" / "data").glob("*.py"), *(ROOT / "docs").glob("*.md")]
CODE = [path.read_text(encoding="utf-8") for path in sorted(SOURCES)]
UNITS = [" ", "\n", "a", "!", "7", "日", "\r\n", "ab", " \t", "'s", "🙂"]
MIXED = ["'s", "'S", "'\u017f", "'LL", "'Re", "'", " ", "  ", "\n", "\r\n", "\t", "\0", "\u00a0", "\u2028", "\x85"]
MIXED += ["a", "Word", "word", "ÀÉ", "ß", "İ", "9", "12345", "٣", "½", "!?", "/", "_", "日本", "🙂", "e\u0301"]
MIXED += ["\U00031350", "\U0001e030", "\u1c89", "\uffff", "\U0010ffff", "\ue000", "\u180e", "\u200b", "\u200d", "ŉ"]

pytestmark = pytest.mark.peers

Both: TypeAlias = tuple[Tokenizer, Any]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return learn_ranks([*CODE, (SCRIPTS + "\n") * 9], 3000)


def named(ranks: dict[bytes, int], name: str, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """The named encoding of tiktoken, with its own pattern and special tokens, over ranks that need no network."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    found = getattr(openai_public, name)()
    return TiktokenTokenizer(name, ranks, found["pat_str"], found["special_tokens"], "<|endoftext|>")


def llama3(ranks: dict[bytes, int], folder: Path) -> Tokenizer:
    """Llama 3's own rank file but for the ranks above ours, which no text reaches."""
    more = {b"\xff" + i.to_bytes(3, "big"): i for i in range(len(ranks), 128_000)}
    (folder / "tokenizer.model").write_bytes(rank_lines(ranks | more))
    return load_tokenizer(str(folder / "tokenizer.model"))


def trained(ranks: dict[bytes, int], folder: Path) -> Tokenizer:
    tokenizer_from_ranks(ranks).save(folder / "trained")
    return load_tokenizer(str(folder / "trained"))


def with_gaps(ranks: dict[bytes, int]) -> Tokenizer:
    """Ranks that are missing, and a special token among them."""
    some = {token: rank for token, rank in ranks.items() if rank not in (500, 501, 2000)}
    special_tokens = {"<|end|>": 501, "<|begin_of_text|>": 3005}
    return TiktokenTokenizer("gaps", some, LLAMA3_PATTERN, special_tokens, "<|end|>")


KINDS = [
    "bytes",
    "rank file",
    "trained",
    "llama 3",
    "gaps",
    "r50k_base",
    "p50k_base",
    "cl100k_base",
    "o200k_base",
    "hf",
]


@pytest.fixture(scope="module", params=KINDS)
def both(
    request: pytest.FixtureRequest, ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    """A tokenizer, and what transformers makes of its export beside the config.json of a Llama."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as monkeypatch:
        kinds: dict[str, Callable[[], Tokenizer]] = {
            "bytes": ByteTokenizer,
            "rank file": lambda: tokenizer_from_ranks(ranks),
            "trained": lambda: trained(ranks, folder),
            "llama 3": lambda: llama3(ranks, folder),
            "gaps": lambda: with_gaps(ranks),
            "hf": lambda: load_tokenizer(f"hf:{exported(tokenizer_from_ranks(ranks), folder / 'origin')}"),
        }
        kind = request.param
        ours = kinds[kind]() if kind in kinds else named(ranks, kind, monkeypatch)
        yield ours, AutoTokenizer.from_pretrained(exported(ours, folder / "model"))


def exported(tokenizer: Tokenizer, folder: Path) -> Path:
    save_hugging_face(tokenizer, folder)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": tokenizer.vocab_size}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def theirs_of(theirs: Any, text: str) -> list[int]:
    return theirs.encode(text, add_special_tokens=False, split_special_tokens=True)


def test_sizes_and_the_end_are_the_same_and_nothing_is_added(both: Both) -> None:
    ours, theirs = both
    ids = ours.encode("in the")
    assert (len(theirs), theirs.eos_token_id) == (ours.vocab_size, ours.eod_id)
    assert theirs("in the").data == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert theirs.encode(theirs.eos_token) == [ours.eod_id]


def test_code_scripts_and_long_runs_have_the_same_ids(both: Both) -> None:
    ours, theirs = both
    runs = [unit * (LONGEST_RUN // len(unit)) for unit in UNITS]
    special = ["<|endoftext|> <|begin_of_text|><|end_of_text|> <unused 3003>", "x\r\n\r\n  \r y"]
    for text in [*CODE, SCRIPTS, SCRIPTS.upper(), *runs, *special]:
        ids = ours.encode(text)
        assert theirs_of(theirs, text) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text


def test_random_characters_have_the_same_ids(both: Both) -> None:
    ours, theirs = both
    rng = random.Random(0)
    legal = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(rng.choices(some, k=35)) for some in (legal, legal[:0x3000], MIXED) for _ in range(300)]
    assert [text for text in texts if theirs_of(theirs, text) != ours.encode(text)] == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text() | st.lists(st.sampled_from(MIXED) | st.characters(exclude_categories=["Cs"])).map("".join))
def test_any_text_has_the_same_ids(both: Both, text: str) -> None:
    ours, theirs = both
    ids = ours.encode(text)
    assert theirs_of(theirs, text) == ids
    assert theirs.decode(ids) == text
