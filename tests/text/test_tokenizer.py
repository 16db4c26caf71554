"""Any text survives, special tokens in text are text, and what cannot be loaded is explained."""

from __future__ import annotations

import base64
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from megallama.errors import UserError
from megallama.text.rank_file import rank_lines, read_rank_file
from megallama.text.split_pattern import LLAMA3_PATTERN, R50K_PATTERN
from megallama.text.tokenizer import LONGEST_RUN, LONGEST_TEXT, load_tokenizer, safe_pieces, tokenizer_from_ranks

TEXTS = ["", "plain", "naïve 日本語 🙂 \u0000\r\n\t", "<|endoftext|> <|begin_of_text|>", " \n  \n x", "é" * 100]


def small_ranks() -> dict[bytes, int]:
    merges = [b"th", b"the", b" the", b"in", b"\n\n", b"  ", b"    "]
    return {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}


@pytest.fixture
def rank_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.tiktoken"
    path.write_bytes(rank_lines(small_ranks()))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(text: str, rank_file: Path) -> None:
    for spec in ("bytes", str(rank_file)):
        tokenizer = load_tokenizer(spec)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_lone_surrogates_and_broken_ids_become_replacement_characters(rank_file: Path) -> None:
    for spec in ("bytes", str(rank_file)):
        tokenizer = load_tokenizer(spec)
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
        assert tokenizer.decode([ord("a"), 0xFF, tokenizer.vocab_size + 5]) == "a\ufffd\ufffd"
        assert tokenizer.decode([tokenizer.eod_id]) == "<|endoftext|>"


def test_bytes_have_257_ids_and_end_at_256() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.encode("aé")) == (257, 256, [97, 0xC3, 0xA9])


def test_a_rank_file_gets_one_special_token_after_its_ranks(rank_file: Path) -> None:
    tokenizer = load_tokenizer(str(rank_file))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (264, 263)
    assert tokenizer.encode("in the") == [259, 258]


def test_a_changed_rank_file_is_read_again(rank_file: Path) -> None:
    before = load_tokenizer(str(rank_file))
    rank_file.write_bytes(rank_lines(small_ranks() | {b"ab": 263}))
    after = load_tokenizer(str(rank_file))
    assert (before.encode("ab"), after.encode("ab")) == ([97, 98], [263])
    assert before.fingerprint != after.fingerprint


def test_a_file_of_128000_ranks_is_llama_3(tmp_path: Path) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"\xff" + i.to_bytes(3, "big"): i for i in range(256, 128_000)}
    (tmp_path / "tokenizer.model").write_bytes(rank_lines(ranks))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.model"))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (128_256, 128_001)
    special = {128_000: "begin_of_text", 128_004: "finetune_right_pad_id", 128_008: "eom_id", 128_009: "eot_id"}
    special |= {128_011: "image", 128_012: "reserved_special_token_2", 128_255: "reserved_special_token_245"}
    assert {i: tokenizer.decode([i]) for i in special} == {i: f"<|{name}|>" for i, name in special.items()}


@pytest.mark.parametrize("spec", ["bytes", "ranks"])
def test_a_saved_tokenizer_is_the_same(spec: str, rank_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(spec if spec == "bytes" else str(rank_file))
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("in the café") == tokenizer.encode("in the café")
    if spec != "bytes":
        assert load_tokenizer(str(tmp_path / "saved" / "ranks.tiktoken")).fingerprint == tokenizer.fingerprint


def test_the_fingerprint_tells_pattern_and_special_tokens_apart(rank_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(rank_file))
    tokenizer.save(tmp_path / "saved")
    sidecar = tmp_path / "saved" / "megallama_tokenizer.json"
    content = sidecar.read_text()
    for old, new in [(r"\\p{N}++", r"\\p{N}"), ("<|endoftext|>", "<|end|>")]:
        sidecar.write_text(content.replace(old, new))
        with pytest.raises(UserError, match="was changed"):
            load_tokenizer(str(tmp_path / "saved"))


@pytest.mark.parametrize("pattern", [R50K_PATTERN, LLAMA3_PATTERN])
def test_cutting_long_text_leaves_the_ids(pattern: str) -> None:
    rng = random.Random(0)
    words = ["the", " the", "in", "\n", "\n\n", "    ", "'s", "123456", "!?", "é", "日本", "\r\n", " "]
    text = "".join(rng.choices(words, k=700_000))
    assert len(text) > 3 * LONGEST_TEXT
    encoding = tiktoken.Encoding(
        "small", pat_str=pattern, mergeable_ranks=small_ranks(), special_tokens={"<|endoftext|>": 263}
    )
    pieces = list(safe_pieces(text))
    assert max(map(len, pieces)) <= LONGEST_TEXT
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in encoding.encode_ordinary(piece)] == encoding.encode_ordinary(text)


@pytest.mark.parametrize("unit", [" ", "\n", "a", "^", "日", "ab "])
def test_a_million_equal_characters_are_encoded_in_seconds(unit: str) -> None:
    tokenizer = tokenizer_from_ranks(small_ranks())
    text = "begin " + unit * (1_000_000 // len(unit)) + " end"
    begin = time.monotonic()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - begin < 20
    if len(unit) == 1:
        assert max(map(len, safe_pieces(text))) <= LONGEST_RUN + len("begin ")


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'r50k_bse'.*r50k_base"):
        load_tokenizer("r50k_bse")
    with pytest.raises(UserError, match=r"'no/such/file'.*bytes"):
        load_tokenizer("no/such/file")
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(UserError, match=r"is no file, no folder and no known encoding"):
            load_tokenizer(name)


def test_a_name_that_cannot_be_downloaded_is_refused_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    # A proxy on a closed port: the download fails on machines with a network too.
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"'r50k_base'.*tokenizer bytes.*tokenizer train.*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("r50k_base")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "256 of the 256 single bytes are missing"),
        (b"not a rank file\n", ":1 is no"),
        (b"!!!! 0\n", ":1 is no"),
        (b'{"model": {}}', ":1 is no"),
        (rank_lines(small_ranks())[:-4], "complete|is no"),
        (rank_lines(small_ranks() | {b"zz": 999}), "ranks must be"),
        (rank_lines({t: r for t, r in small_ranks().items() if t != b"a"}), "1 of the 256"),
        (base64.b64encode(b"a") + b" x\n", ":1 is no"),
    ],
)
def test_a_broken_rank_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rank_file(path)


def test_an_incomplete_folder_is_refused(tmp_path: Path, rank_file: Path) -> None:
    with pytest.raises(UserError, match="holds no megallama_tokenizer"):
        load_tokenizer(str(tmp_path))
    load_tokenizer(str(rank_file)).save(tmp_path / "saved")
    (tmp_path / "saved" / "ranks.tiktoken").unlink()
    with pytest.raises(UserError, match="incomplete"):
        load_tokenizer(str(tmp_path / "saved"))
    (tmp_path / "saved" / "megallama_tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        load_tokenizer(str(tmp_path / "saved"))


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "3"])
def test_a_sidecar_that_is_no_object_is_refused(tmp_path: Path, rank_file: Path, content: str) -> None:
    load_tokenizer(str(rank_file)).save(tmp_path / "saved")
    (tmp_path / "saved" / "megallama_tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"megallama_tokenizer\.json is no JSON object.*again"):
        load_tokenizer(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    "damage",
    [
        {"pattern": "(unclosed"},
        {"pattern": 3},
        {"special_tokens": []},
        {"special_tokens": {"<|endoftext|>": -1}},
        {"end_of_document": None},
        {"fingerprint": None},
    ],
)
def test_a_damaged_rule_is_refused(tmp_path: Path, rank_file: Path, damage: dict[str, Any]) -> None:
    load_tokenizer(str(rank_file)).save(tmp_path / "saved")
    sidecar = tmp_path / "saved" / "megallama_tokenizer.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | damage))
    with pytest.raises(UserError, match=r"saved was changed after it was saved; save or train it again"):
        load_tokenizer(str(tmp_path / "saved"))
