"""A tokenizer.json gives the library's ids, a saved one the same ids, and what is none is explained."""

from __future__ import annotations

import json
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, processors

from megallama.config.data_keys import DataConfig
from megallama.corpus.building.build import build_dataset
from megallama.data.source import open_source
from megallama.errors import UserError
from megallama.generation.generate import generate
from megallama.generation.load import load_model
from megallama.generation.sampling import Sampling
from megallama.generation.text import TextStream
from megallama.text.hf_tokenizer import save_hugging_face
from megallama.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_ranks
from tests.launching import arguments, pretrain

TEXTS = ["", "plain", "naïve 日本語 🙂 \u0000\r\n\t", "<|endoftext|> </s> <s>", " \n  \n x", "é" * 100, "in the  end"]
RANKS = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258, b"in": 259, b"\n\n": 260}


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    """A byte-level BPE as a folder of a model."""
    save_hugging_face(tokenizer_from_ranks(RANKS), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def metaspace(tmp_path: Path) -> Path:
    """Like Llama 2's: a blank is put before the text and each blank is a low line, bytes for rare characters."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in [*"▁abcdefghijklmnopqrstuvwxyz<>/|", "th", "the", "▁the"]:
        vocabulary[token] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    library = Library(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.enable_truncation(4)
    library.enable_padding(length=9)
    content = json.loads(library.to_str())
    replaced = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path / "tokenizer.json"


def test_bytes_that_are_no_character_do_not_garble_those_around(metaspace: Path) -> None:
    tokenizer = load_tokenizer(f"hf:{metaspace}")
    ids = tokenizer.encode("the 日本🎉 a")
    assert tokenizer.decode(ids) == "the 日本🎉 a"
    start = len(tokenizer.encode("the 日"))
    assert tokenizer.decode(ids[: start + 1]) == "the 日\ufffd"
    rng = random.Random(0)
    for _ in range(100):
        ids = tokenizer.encode("the " + "".join(rng.choice("abc 日本🎉é ") for _ in range(30)))
        stream = TextStream(tokenizer, before=ids[:2])
        written = "".join(map(stream.push, ids[2:])) + stream.end()
        assert tokenizer.decode(ids[:2]) + written == tokenizer.decode(ids)


def test_a_byte_level_file_gives_the_ids_of_its_ranks(byte_level: Path, tmp_path: Path) -> None:
    ranks = tokenizer_from_ranks(RANKS)
    load_tokenizer(f"hf:{byte_level}").save(tmp_path / "saved")
    for spec in (f"hf:{byte_level}", f"hf:{byte_level}/tokenizer.json", str(tmp_path / "saved")):
        found = load_tokenizer(spec)
        assert (found.vocab_size, found.eod_id) == (262, 261)
        assert [found.encode(text) for text in TEXTS] == [ranks.encode(text) for text in TEXTS]
        assert [found.decode(found.encode(text)) for text in TEXTS] == TEXTS


@pytest.mark.parametrize("copy", [lambda found: found, lambda found: pickle.loads(pickle.dumps(found))])
def test_nothing_is_added_cut_or_filled_and_special_tokens_in_text_are_text(
    metaspace: Path, copy: Callable[[Tokenizer], Tokenizer]
) -> None:
    found = copy(load_tokenizer(f"hf:{metaspace}"))
    assert (found.vocab_size, found.eod_id) == (293, 2)
    assert [found.decode([i]) for i in found.encode("the the")] == ["the", "the"]
    for text in TEXTS[1:]:
        ids = found.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert found.decode(ids) == text


def test_lone_surrogates_and_broken_ids_become_replacement_characters(byte_level: Path) -> None:
    found = load_tokenizer(f"hf:{byte_level}")
    assert found.decode(found.encode("a\ud800b")) == "a\ufffdb"
    assert found.decode([64, 255, -1, 262, 1 << 40, 261]) == "@" + "\ufffd" * 4 + "<|endoftext|>"


def test_a_saved_tokenizer_is_the_same_and_keeps_the_files(byte_level: Path, tmp_path: Path) -> None:
    (byte_level / "chat_template.jinja").write_text("{{ messages }}")
    found = load_tokenizer(f"hf:{byte_level}")
    found.save(tmp_path / "saved")
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert (loaded.fingerprint, loaded.eod_id) == (found.fingerprint, found.eod_id)
    save_hugging_face(loaded, tmp_path / "exported")
    files = {path.name: path.read_bytes() for path in byte_level.iterdir()}
    assert len(files) == 4
    assert {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()} == files


def test_a_saved_folder_that_was_changed_or_cut_is_refused(byte_level: Path, tmp_path: Path) -> None:
    load_tokenizer(f"hf:{byte_level}").save(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"saved was changed after it was saved"):
        load_tokenizer(str(tmp_path / "saved"))
    path.unlink()
    with pytest.raises(UserError, match=r"incomplete \(tokenizer\.json\)"):
        load_tokenizer(str(tmp_path / "saved"))


def test_the_fingerprint_covers_what_ids_depend_on_and_no_more(metaspace: Path) -> None:
    content = json.loads(metaspace.read_text())

    def fingerprint(change: dict[str, Any]) -> str:
        metaspace.write_text(json.dumps(content | change, indent=3))
        return load_tokenizer(f"hf:{metaspace}").fingerprint

    first = fingerprint({})
    assert fingerprint({"truncation": None, "padding": None, "post_processor": None, "decoder": None}) == first
    assert fingerprint({"normalizer": None}) != first
    assert fingerprint({"model": content["model"] | {"merges": content["model"]["merges"][:1]}}) != first
    (metaspace.parent / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    assert fingerprint({}) != first


@pytest.mark.parametrize(
    ("files", "eod_id"),
    [
        ({}, 2),
        ({"tokenizer_config.json": {"eos_token": "<s>"}}, 1),
        ({"tokenizer_config.json": {"eos_token": {"content": "<s>", "lstrip": False}}}, 1),
        ({"tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": "<unk>"}}, 0),
        ({"generation_config.json": {"eos_token_id": [1, 2]}, "config.json": {"eos_token_id": 0}}, 1),
        ({"config.json": {"eos_token_id": 1}}, 1),
    ],
)
def test_the_end_of_document_is_that_of_the_model(metaspace: Path, files: dict[str, Any], eod_id: int) -> None:
    for name, content in files.items():
        (metaspace.parent / name).write_text(json.dumps(content))
    assert load_tokenizer(f"hf:{metaspace}").eod_id == eod_id


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "ends documents with '<end>', which is no token"),
        ("tokenizer_config.json", '{"eos_token": [[]]}', "which is no token of tokenizer.json"),
        ("config.json", '{"eos_token_id": 293}', "ends documents with '293', which is no token"),
        ("config.json", '{"eos_token_id": -1}', "ends documents with '-1', which is no token"),
        ("generation_config.json", "{", "generation_config.json is no JSON"),
    ],
)
def test_an_end_of_document_that_is_none_is_refused(metaspace: Path, name: str, content: str, message: str) -> None:
    (metaspace.parent / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(f"hf:{metaspace}")


def test_without_an_end_of_document_the_way_to_name_one_is_told(metaspace: Path) -> None:
    metaspace.write_text(metaspace.read_text().replace('"</s>"', '"<fin>"'))
    with pytest.raises(UserError, match=r"nothing beside .*put a tokenizer_config\.json there .*eos_token"):
        load_tokenizer(f"hf:{metaspace}")


def broken(**model: Any) -> bytes:
    return json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []} | model}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"\x93NUMPY\x01", "is no JSON"),
        (pickle.dumps({"model": os.getcwd}), "is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "is no JSON object"),
        (b'{"architectures": ["LlamaForCausalLM"]}', "has no `model`"),
        (b'{"model": {"type": "BPE"}, "added_tokens": 3}', "has no `model`"),
        (b'{"model": {"type": "Nonsense"}}', "this version can read"),
        (b'{"model": ' + b'{"a":' * 500 + b"1" + b"}" * 501, "this version can read"),
        (broken(merges=[["a", "b"]]), "this version can read"),
        (broken(vocab={"a": -5}), "this version can read"),
        (broken(vocab={}), "has no ids"),
        (broken(vocab={"a": (1 << 32) - 1}), "or ids above"),
        (broken(dropout=0.1), "dropout of 0.1"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(f"hf:{tmp_path}/tokenizer.json")


def test_what_cannot_be_read_is_refused(tmp_path: Path, byte_level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "/none", "a\0b", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(UserError, match=r"there is no file|cannot be read"):
            load_tokenizer(f"hf:{name}")
    with pytest.raises(UserError, match=r"model holds no megallama_tokenizer\.json; .*hf:.*model"):
        load_tokenizer(str(byte_level))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="no regular file"):
        load_tokenizer(f"hf:{tmp_path}/fifo")
    monkeypatch.setattr("megallama.text.tokenizer_files.LARGEST_FILE", 1000)
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        load_tokenizer(f"hf:{byte_level}")


def test_text_that_the_library_cannot_encode_is_refused(tmp_path: Path) -> None:
    Library(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<none>")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="cannot encode 'b'"):
        load_tokenizer(f"hf:{tmp_path}").encode("b")


def test_a_pattern_that_backtracks_is_refused_in_seconds(byte_level: Path) -> None:
    path = byte_level / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": r"(x+x+)+y|[\s\S]"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": split}))
    found = load_tokenizer(f"hf:{path}")
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"cannot encode 'xxx.*retry-limit"):
        found.encode("x" * 10_000)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("unit", [" ", "\n", "a", "日"])
def test_long_runs_of_a_character_are_encoded_in_seconds(unit: str, byte_level: Path, metaspace: Path) -> None:
    for path in (byte_level, metaspace):
        begin = time.monotonic()
        assert len(load_tokenizer(f"hf:{path}").encode(unit * 300_000)) >= 150_000
        assert time.monotonic() - begin < 10  # far more if it grew with the square


def test_a_run_keeps_its_tokenizer(byte_level: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("in the beginning <|endoftext|> of the end\n\n" * 200)
    spec, prefix, run = f"hf:{byte_level}", str(tmp_path / "corpus"), tmp_path / "run"
    info, _ = build_dataset([str(tmp_path / "corpus.txt")] * 5, prefix, spec, workers=1)
    assert (info.vocab_size, info.fingerprint) == (262, load_tokenizer(spec).fingerprint)
    with pytest.raises(UserError, match=r"data\.tokenizer=bytes is not the tokenizer of the dataset"):
        open_source(DataConfig(path=prefix, tokenizer="bytes", sequence_length=8), "train", 0, 262)
    with pytest.raises(UserError, match="vocab"):
        open_source(DataConfig(path=prefix, tokenizer=spec, sequence_length=8), "train", 0, 100)
    words = arguments(prefix, run, f"data.tokenizer={spec}", "model.vocab_size=262")
    assert pretrain(1, words) == [(0, "")]
    loaded = load_model(run)
    assert loaded.tokenizer.fingerprint == info.fingerprint
    assert generate(loaded, "in the", 5, Sampling(temperature=0.0)).startswith("in the")
