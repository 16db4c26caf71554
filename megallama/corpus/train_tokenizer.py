"""Byte-level BPE trained on a corpus and saved as tiktoken ranks.

The `tokenizers` library counts and merges; what it learnt is kept as ranks only, and tiktoken, loaded from the ranks,
is the one that encodes. Ranks 0 to 255 are the single bytes, merges follow in the order in which they were learnt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, pre_tokenizers, trainers

from megallama.corpus.reading.corpora import describe_source, iterate_documents
from megallama.errors import UserError, check_printable
from megallama.system.lock import output_lock
from megallama.system.remote import is_url
from megallama.system.whole_file import put, remove_leftovers
from megallama.text.byte_level import STAND_INS
from megallama.text.tokenizer import (
    RANKS_NAME,
    TiktokenTokenizer,
    load_tokenizer,
    tokenizer_from_ranks,
)
from megallama.text.tokenizer_files import SIDECAR_NAME

# More text hardly changes the merges, and costs time and memory.
TRAINING_CHARACTERS = 200_000_000
TRAINING_NAME = "training.json"


def train_tokenizer(
    sources: Sequence[str], folder: str, vocab_size: int, *, text_field: str = "text", force: bool = False
) -> tuple[TiktokenTokenizer, bool]:
    """Train on `sources`, save into `folder`; returns the tokenizer, and whether it stood there already.

    `vocab_size` counts the end of document too. UserError for fewer than 257 entries, for more than the text gives,
    for a folder that cannot be made, and for one that holds another tokenizer, unless `force`.
    """
    if not folder:
        raise UserError("--output '' names no folder; use for example --output tokenizer")
    check_printable("--output", folder)
    if is_url(folder):
        raise UserError(f"--output {folder} is a URL, and a tokenizer is saved on a disk; name a folder there")
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size} is less than the 256 bytes and the end of document; least: 257")
    origin = _origin(sources, vocab_size, text_field)
    try:
        if not force and (found := _standing_tokenizer(Path(folder), origin)):
            return found, True
        with output_lock(Path(folder) / ".lock", f"--output {folder}", "--output") as lock:
            if not force and (found := _standing_tokenizer(Path(folder), origin)):
                return found, True
            ranks = learn_ranks(iterate_documents(sources, text_field), vocab_size - 1)
            tokenizer = tokenizer_from_ranks(ranks)
            lock.check()
            _replace(Path(folder), tokenizer, origin)
    except OSError as error:
        raise UserError(
            f"the tokenizer --output {folder} cannot be made ({error.strerror}); mend that or choose another --output"
        ) from None
    return tokenizer, False


def _replace(folder: Path, tokenizer: TiktokenTokenizer, origin: bytes) -> None:
    """Put the tokenizer into the folder; its side file, which vouches for the others, goes first and comes last."""
    for name in (SIDECAR_NAME, RANKS_NAME, TRAINING_NAME):
        remove_leftovers(folder / name)
    (folder / SIDECAR_NAME).unlink(missing_ok=True)
    put(folder / TRAINING_NAME, origin)
    tokenizer.save(folder)


def learn_ranks(documents: Iterable[str], num_ranks: int) -> dict[bytes, int]:
    """Token bytes -> rank, `num_ranks` of them, from the first TRAINING_CHARACTERS of text; UserError if too little."""
    model = HuggingFaceTokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's split pattern
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks, min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    model.train_from_iterator(_first_characters(documents), trainer)
    merges = json.loads(model.to_str())["model"]["merges"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    byte_of = {character: byte for byte, character in enumerate(STAND_INS)}
    for left, right in merges:
        # Two merges can make the same token: the first one gives the rank.
        ranks.setdefault(bytes(byte_of[character] for character in left + right), len(ranks))
    if len(ranks) != num_ranks:
        raise UserError(
            f"--vocab-size {num_ranks + 1} is more than this text gives; largest: {len(ranks) + 1}, or add text"
        )
    return ranks


def _first_characters(documents: Iterable[str]) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for document in documents:
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return


def _origin(sources: Sequence[str], vocab_size: int, text_field: str) -> bytes:
    """The content of TRAINING_NAME: a hash over everything that determines the tokenizer."""
    content = [[describe_source(source) for source in sources], vocab_size, text_field]
    inputs = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"inputs": inputs}) + "\n").encode()


def _standing_tokenizer(folder: Path, origin: bytes) -> TiktokenTokenizer | None:
    """The tokenizer in the folder if it is of `origin`, None if there is none, UserError if it is another."""
    try:
        (folder / SIDECAR_NAME).stat()  # exists() would find nothing where `folder` is a file
    except FileNotFoundError:
        return None
    training = folder / TRAINING_NAME
    if not training.exists() or training.read_bytes() != origin:
        raise UserError(
            f"{folder} holds a tokenizer that is not known to be of these sources and this size; "
            "add --force to replace it or choose another --output"
        )
    found = load_tokenizer(str(folder))
    assert isinstance(found, TiktokenTokenizer)
    return found
