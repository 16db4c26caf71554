"""Text to token ids and back: raw bytes, a tiktoken encoding, or a tokenizer.json of Hugging Face.

A tiktoken encoding is loaded by name, from a rank file or from a saved folder, a tokenizer.json by hf_tokenizer.py.
A saved folder holds the rank file `ranks.tiktoken` and beside it `megallama_tokenizer.json` with the split pattern, the
special tokens and the fingerprint.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from megallama.errors import UserError
from megallama.system.whole_file import put
from megallama.text.byte_level import byte_level_files
from megallama.text.hf_tokenizer import HF_FORMAT, load_hugging_face, load_saved
from megallama.text.rank_file import rank_lines, read_rank_file, read_ranks
from megallama.text.split_pattern import LLAMA3_PATTERN, R50K_PATTERN, automaton_first, check_pattern
from megallama.text.surrogates import without_surrogates
from megallama.text.tokenizer_files import LARGEST_ID, SIDECAR_NAME, read_sidecar, write_sidecar

END_OF_TEXT = "<|endoftext|>"
RANKS_NAME = "ranks.tiktoken"

LLAMA3_NUM_RANKS = 128_000
LLAMA3_NUM_SPECIAL = 256
LLAMA3_END = "<|end_of_text|>"
LLAMA3_NAMED = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id step_id "
    "start_header_id end_header_id eom_id eot_id python_tag image"
)

# Beyond these tiktoken may panic or take quadratic time (tiktoken issue 195).
LONGEST_TEXT = 400_000
LONGEST_RUN = 25_000

DOWNLOAD_SECONDS = 60.0
HF_PREFIX = "hf:"


class Encoder(Protocol):
    """What a build needs of a tokenizer."""

    @property
    def eod_id(self) -> int:
        """Id appended to every document."""

    def pieces(self, text: str) -> Iterator[npt.NDArray[np.integer[Any]]]:
        """The ids of `text`, in arrays one behind the other: a long text takes little memory so."""


class Tokenizer(Encoder, Protocol):
    """What the rest of megallama knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: every id is below it."""

    @property
    def unused_ids(self) -> frozenset[int]:
        """Ids below `vocab_size` that stand for no token."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that determines the ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in the text are plain text. Lone surrogates become U+FFFD."""

    def parts(self, text: str) -> Iterable[str]:
        """`text` in one or more parts: their ids, one behind the other, are those of `encode(text)`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; broken UTF-8 and ids without a token become U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(folder)` needs to give the same ids."""

    def hugging_face_files(self) -> dict[str, bytes]:
        """Name -> content of what `save_hugging_face` writes; UserError if these rules cannot be written so."""


class ByteTokenizer:
    """Each byte of UTF-8 is its own id; 256 ends a document."""

    vocab_size = 257
    eod_id = 256
    unused_ids: frozenset[int] = frozenset()
    fingerprint = hashlib.sha256(b"megallama bytes 257").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(without_surrogates(text).encode())

    def parts(self, text: str) -> Iterable[str]:
        return (text,)

    def pieces(self, text: str) -> Iterator[npt.NDArray[np.integer[Any]]]:
        yield np.frombuffer(without_surrogates(text).encode(), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(
            bytes([i]) if 0 <= i < 256 else END_OF_TEXT.encode() if i == self.eod_id else "\ufffd".encode() for i in ids
        ).decode(errors="replace")

    def save(self, folder: Path) -> None:
        write_sidecar(folder, {"format": "bytes", "fingerprint": self.fingerprint})

    def hugging_face_files(self) -> dict[str, bytes]:
        return byte_level_files({bytes([i]): i for i in range(256)}, None, {END_OF_TEXT: 256}, END_OF_TEXT)


class TiktokenTokenizer:
    """A tiktoken encoding whose document end is the special token `end`."""

    def __init__(
        self, name: str, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int], end: str
    ) -> None:
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self._end = end
        self._encoding = tiktoken.Encoding(
            name, pat_str=automaton_first(pattern), mergeable_ranks=ranks, special_tokens=special_tokens
        )
        self.vocab_size = self._encoding.n_vocab
        self.eod_id = special_tokens[end]

    def __reduce__(self) -> tuple[Any, ...]:
        """By value: tiktoken would load a named encoding again."""
        return TiktokenTokenizer, (self._encoding.name, self.ranks, self.pattern, self.special_tokens, self._end)

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self._rules(), self._rank_lines)

    @cached_property
    def unused_ids(self) -> frozenset[int]:
        used = {*self.ranks.values(), *self.special_tokens.values()}
        return frozenset(range(self.vocab_size)) - used

    @cached_property
    def _rank_lines(self) -> bytes:
        return rank_lines(self.ranks)

    def _rules(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "special_tokens": self.special_tokens, "end_of_document": self._end}

    def encode(self, text: str) -> list[int]:
        if len(text) <= LONGEST_RUN:
            return self._ids(text)
        return [i for part in safe_pieces(text) for i in self._ids(part)]

    def parts(self, text: str) -> Iterable[str]:
        return (text,) if len(text) <= LONGEST_RUN else safe_pieces(text)

    def pieces(self, text: str) -> Iterator[npt.NDArray[np.integer[Any]]]:
        for piece in self.parts(text):
            with self._panics_told(piece):
                try:
                    ids = self._encoding.encode_to_numpy(piece, disallowed_special=())
                except UnicodeEncodeError:
                    ids = self._encoding.encode_to_numpy(without_surrogates(piece), disallowed_special=())
            yield ids

    def _ids(self, text: str) -> list[int]:
        with self._panics_told(text):
            return self._encoding.encode_ordinary(text)

    @contextmanager
    def _panics_told(self, text: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust, derived from BaseException and importable nowhere
                raise
            raise UserError(
                f"tokenizer {self._encoding.name} cannot split {text[:40]!r} ({error}); use another"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._token_bytes(i) for i in ids).decode(errors="replace")

    def _token_bytes(self, token: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):  # some encodings leave ids without a token below n_vocab
            return "\ufffd".encode()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        put(folder / RANKS_NAME, self._rank_lines)
        write_sidecar(folder, {"format": "tiktoken", "fingerprint": self.fingerprint, **self._rules()})

    def hugging_face_files(self) -> dict[str, bytes]:
        return byte_level_files(self.ranks, self.pattern, self.special_tokens, self._end)


def load_tokenizer(spec: str) -> Tokenizer:
    """Of `bytes`, a tiktoken encoding by name, a tiktoken rank file, a folder that `save` wrote, or `hf:FILE`.

    FILE is a tokenizer.json or a folder that holds one. UserError for what is none of these.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec in tiktoken.list_encoding_names():
        found = _download_encoding(spec)
        ranks, special_tokens = found._mergeable_ranks, found._special_tokens
        return TiktokenTokenizer(spec, ranks, found._pat_str, special_tokens, END_OF_TEXT)
    if spec.startswith(HF_PREFIX):
        return load_hugging_face(Path(spec.removeprefix(HF_PREFIX)))
    path = Path(spec)
    if os.path.isdir(path):  # unlike Path's methods, it takes any name
        return _load_folder(path)
    if os.path.isfile(path):
        if path.name == RANKS_NAME and (path.parent / SIDECAR_NAME).exists():
            return _load_folder(path.parent)
        return _load_rank_file(path)
    names = ["bytes", *tiktoken.list_encoding_names()]
    near = difflib.get_close_matches(spec, names, n=2, cutoff=0.5) or names
    raise UserError(
        f"tokenizer {spec!r} is no file, no folder and no known encoding; did you mean {' or '.join(near)}?"
    )


def tokenizer_from_ranks(ranks: dict[bytes, int]) -> TiktokenTokenizer:
    """GPT-2's split pattern over `ranks`, and one special token after the last rank that ends documents."""
    return TiktokenTokenizer("ranks", ranks, R50K_PATTERN, {END_OF_TEXT: len(ranks)}, END_OF_TEXT)


def safe_pieces(text: str) -> Iterator[str]:
    """Cut `text` so that tiktoken takes each piece well; the ids are those of the whole text.

    Pieces are at most LONGEST_TEXT characters, cut between a letter or digit and a blank, where every pattern here
    ends a match and none looks back. Ids may differ only where there is no such place in half a piece, and in runs of
    more than LONGEST_RUN blanks or non-blanks, which are cut.
    """
    start = 0
    while start < len(text):
        stop = _safe_stop(text, start)
        yield from _cut_long_runs(text[start:stop])
        start = stop


def _safe_stop(text: str, start: int) -> int:
    limit = start + LONGEST_TEXT
    if limit >= len(text):
        return len(text)
    for stop in range(limit, start + LONGEST_TEXT // 2, -1):
        if text[stop] in " \n" and text[stop - 1].isalnum():
            return stop
    return limit


def _cut_long_runs(text: str) -> Iterator[str]:
    # A run longer than LONGEST_RUN holds one whole block of half that length; looking at blocks first costs nothing.
    block = LONGEST_RUN // 2
    if all(len(text[i : i + block].split(None, 1)) > 1 for i in range(0, len(text) - block + 1, block)):
        yield text
        return
    start = 0
    for run in re.finditer(r"\S+|\s+", text):
        for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _load_rank_file(path: Path) -> Tokenizer:
    ranks = read_rank_file(path)
    if len(ranks) != LLAMA3_NUM_RANKS:
        return tokenizer_from_ranks(ranks)
    named = LLAMA3_NAMED.split()
    named += [f"reserved_special_token_{2 + i}" for i in range(LLAMA3_NUM_SPECIAL - len(named))]
    special_tokens = {f"<|{name}|>": LLAMA3_NUM_RANKS + i for i, name in enumerate(named)}
    return TiktokenTokenizer("llama3", ranks, LLAMA3_PATTERN, special_tokens, LLAMA3_END)


def _load_folder(folder: Path) -> Tokenizer:
    sidecar = read_sidecar(folder)
    if sidecar.get("format") == HF_FORMAT:
        return load_saved(folder, sidecar)
    rules: dict[str, Any] = {}
    ranks: dict[bytes, int] = {}
    found = ByteTokenizer.fingerprint
    try:
        if sidecar["format"] != "bytes":
            rules = {name: sidecar[name] for name in ("pattern", "special_tokens", "end_of_document")}
            ranks = read_ranks(folder / RANKS_NAME)
            found = _fingerprint(rules, rank_lines(ranks))
        expected = sidecar["fingerprint"]
    except (KeyError, FileNotFoundError) as missing:
        raise UserError(f"tokenizer folder {folder} is incomplete ({missing}); save or train it again") from None
    except RecursionError:
        raise UserError(f"{folder / SIDECAR_NAME} is nested too deeply; save or train the tokenizer again") from None
    if found != expected:
        raise UserError(f"tokenizer folder {folder} was changed after it was saved; save or train it again")
    if not rules:
        return ByteTokenizer()
    pattern, special_tokens, end = rules["pattern"], rules["special_tokens"], rules["end_of_document"]
    try:
        _check_ids(ranks, special_tokens, end)
        if not isinstance(pattern, str):
            raise UserError("the pattern is no text")
        check_pattern(pattern)
    except UserError as error:
        raise UserError(f"tokenizer folder {folder} is damaged: {error}; save or train it again") from None
    return TiktokenTokenizer(folder.name, ranks, pattern, special_tokens, end)


def _check_ids(ranks: dict[bytes, int], special_tokens: Any, end: Any) -> None:
    """UserError, as a clause, unless each token has an id of its own that a dataset can hold, and `end` has one."""
    if not isinstance(special_tokens, dict) or not isinstance(end, str) or end not in special_tokens:
        raise UserError(f"its special tokens do not hold its end of document {str(end)[:40]!r}")
    taken = set(ranks.values())
    if len(taken) < len(ranks):
        raise UserError(f"two tokens of {RANKS_NAME} have one rank")
    for token, number in [*ranks.items(), *special_tokens.items()]:
        if type(number) is not int or not 0 <= number <= LARGEST_ID:
            raise UserError(f"the id of {token[:40]!r} is no whole number from 0 to {LARGEST_ID}")
    for name, number in special_tokens.items():
        if number in taken:
            raise UserError(f"the id {number} of the special token {name[:40]!r} is that of another token")
        if not name or without_surrogates(name) != name:
            raise UserError(f"the name {name[:40]!r} of a special token is no text")
        taken.add(number)


def _fingerprint(rules: dict[str, Any], ranks: bytes) -> str:
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode() + ranks).hexdigest()


def _download_encoding(name: str) -> tiktoken.Encoding:
    """The named encoding from tiktoken's cache or the network; UserError if neither has it within a minute.

    In a daemon thread, since tiktoken sets no time limit on its download.
    """
    outcome: list[tiktoken.Encoding | Exception] = [TimeoutError(f"no answer in {DOWNLOAD_SECONDS:.0f} s")]

    def download() -> None:
        try:
            outcome[0] = tiktoken.get_encoding(name)
        except Exception as error:  # tiktoken lets through whatever its HTTP client or the disk raises
            outcome[0] = error

    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if isinstance(outcome[0], Exception):
        raise UserError(
            f"encoding {name!r} is not in tiktoken's cache and could not be downloaded ({type(outcome[0]).__name__}); "
            "offline use tokenizer bytes, a folder from `megallama tokenizer train`, the path of a tiktoken rank file, "
            "or set TIKTOKEN_CACHE_DIR to a filled cache"
        )
    return outcome[0]
