"""Tokenizers of Hugging Face: a `tokenizer.json` through the library that defines it, and the files for transformers.

The end of document is what the model's own files call the end of a sequence. A saved folder holds the files unchanged,
and beside them `megallama_tokenizer.json` with the end of document and the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Library

from megallama.errors import UserError
from megallama.system.whole_file import put
from megallama.text.byte_level import CONFIG_NAME, SPECIAL_NAME, TOKENIZER_NAME, config_files
from megallama.text.surrogates import without_surrogates
from megallama.text.tokenizer_files import LARGEST_ID, SIDECAR_NAME, parse_object, read_content, write_sidecar

if TYPE_CHECKING:
    from megallama.text.tokenizer import Tokenizer

HF_FORMAT = "hugging_face"
CHAT_NAME = "chat_template.jinja"
END_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>")

# Of these no id of a text depends: they cut, fill, frame or decode.
_WITHOUT_EFFECT = ("version", "truncation", "padding", "post_processor", "decoder")
_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token that stands for a byte, where the decoder is told so."""
_ADVICE = "name the tokenizer.json of a model, as hf:FOLDER/tokenizer.json"


class HuggingFaceTokenizer:
    """The rules of a tokenizer.json; no special token is added to a text.

    Special tokens written in a text are plain text. Tokens that the file adds and does not call special are tokens of
    the text, and so is what a Unigram or WordLevel model has in its vocabulary.
    """

    def __init__(self, files: Mapping[str, bytes], library: Library, end: str) -> None:
        """`files` by name, tokenizer.json among them, of which `library` is made."""
        self._files = dict(files)
        self._library = library
        self._end = end
        eod_id = library.token_to_id(end)
        assert eod_id is not None
        self.eod_id = eod_id
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        self._falls_back = '"ByteFallback"' in library.to_str()

    def __reduce__(self) -> tuple[Any, ...]:
        """Not by the library's own pickle, which forgets that special tokens in a text are plain text."""
        return _from_files, (self._files, self._end)

    @cached_property
    def unused_ids(self) -> frozenset[int]:
        return frozenset(range(self.vocab_size)).difference(self._library.get_vocab(with_added_tokens=True).values())

    @cached_property
    def fingerprint(self) -> str:
        rules = json.loads(self._files[TOKENIZER_NAME])
        rules = {name: value for name, value in rules.items() if name not in _WITHOUT_EFFECT}
        return hashlib.sha256(json.dumps([rules, self._end], sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        try:
            return self._library.encode(without_surrogates(text), add_special_tokens=False).ids
        except BaseException as error:
            if not _of_library(error):
                raise
            raise UserError(f"this tokenizer cannot encode {text[:40]!r} ({error}); use another") from None

    def parts(self, text: str) -> Iterable[str]:
        return (text,)

    def pieces(self, text: str) -> Iterator[npt.NDArray[np.integer[Any]]]:
        yield np.array(self.encode(text), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        for known, run in groupby(ids, self._has_token):
            some = list(run)
            parts.append(self._decode_known(some) if known else "\ufffd" * len(some))
        return "".join(parts)

    def _decode_known(self, ids: list[int]) -> str:
        if not self._falls_back:
            return self._library.decode(ids, skip_special_tokens=False)
        # For the library a whole run of bytes is lost if one of them is no part of a character.
        tokens = [self._library.id_to_token(number) or "" for number in ids]
        text: str = self._library.decoder.decode(list(_sound(tokens)))
        return text

    def _has_token(self, number: int) -> bool:
        return 0 <= number < self.vocab_size and self._library.id_to_token(number) is not None

    def save(self, folder: Path) -> None:
        _put_all(folder, self._files)
        write_sidecar(folder, {"format": HF_FORMAT, "fingerprint": self.fingerprint, "end_of_document": self._end})

    def hugging_face_files(self) -> dict[str, bytes]:
        return dict(self._files) if CONFIG_NAME in self._files else {**self._files, **config_files(self._end)}


def _sound(tokens: Sequence[str]) -> Iterator[str]:
    """The tokens, with U+FFFD for what among bytes is no part of a character."""
    for is_byte, run in groupby(tokens, lambda token: _BYTE.fullmatch(token) is not None):
        if not is_byte:
            yield from run
            continue
        for character in bytes(int(token[3:5], 16) for token in run).decode(errors="replace"):
            yield from [character] if character == "\ufffd" else (f"<0x{byte:02X}>" for byte in character.encode())


def load_hugging_face(path: Path) -> HuggingFaceTokenizer:
    """Of a tokenizer.json, or of the folder that holds one, with the files beside it; UserError if there is none."""
    file = path / TOKENIZER_NAME if os.path.isdir(path) else path
    try:
        content = read_content(file)
    except FileNotFoundError:
        raise UserError(f"there is no file {file} for tokenizer hf:{path}; {_ADVICE}") from None
    library = _library(content, file)
    files = {TOKENIZER_NAME: content}
    for name in (CONFIG_NAME, SPECIAL_NAME, CHAT_NAME):
        if (found := _content_if_there(file.parent / name)) is not None:
            files[name] = found
    return HuggingFaceTokenizer(files, library, _end_of_document(file, library))


def load_saved(folder: Path, sidecar: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """What `save` wrote into `folder`, of which `sidecar` is the side file; UserError if it was changed."""
    if not (folder / TOKENIZER_NAME).exists():
        raise UserError(f"tokenizer folder {folder} is incomplete ({TOKENIZER_NAME}); save it again")
    found = load_hugging_face(folder)
    if found.fingerprint != sidecar.get("fingerprint"):
        raise UserError(f"tokenizer folder {folder} was changed after it was saved; save it again")
    return found


def save_hugging_face(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files by which `transformers.AutoTokenizer.from_pretrained(folder)` gives the ids of `tokenizer`.

    With `add_special_tokens=False`, and `split_special_tokens=True` where text may hold the names of special tokens.
    Runs of more than `LONGEST_RUN` blanks or non-blanks, which `TiktokenTokenizer` cuts, may have other ids. UserError
    for a split pattern that the `tokenizers` library understands otherwise.
    """
    _put_all(folder, tokenizer.hugging_face_files())


def _put_all(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        put(folder / name, content)


def _from_files(files: Mapping[str, bytes], end: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(files, _library(files[TOKENIZER_NAME], Path(TOKENIZER_NAME)), end)


def _library(content: bytes, file: Path) -> Library:
    rules = parse_object(content, file, _ADVICE)
    model = rules.get("model")
    if not isinstance(model, dict) or not isinstance(rules.get("added_tokens", []), list):
        raise UserError(f"{file} is no tokenizer.json: it has no `model`; {_ADVICE}")
    if model.get("dropout"):
        raise UserError(f"{file} has a dropout of {model['dropout']}, so no two ids are sure; set it to null")
    try:
        library = Library.from_buffer(content)
    except BaseException as error:
        if not _of_library(error):
            raise
        raise UserError(f"{file} is no tokenizer.json that this version can read ({error}); {_ADVICE}") from None
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    numbers = library.get_vocab(with_added_tokens=True).values()
    if not numbers or max(numbers) > LARGEST_ID:
        raise UserError(f"{file} has no ids, or ids above {LARGEST_ID}; {_ADVICE}")
    return library


def _end_of_document(file: Path, library: Library) -> str:
    """The token that ends a document. UserError if no file beside `file` names it and none has a usual name."""
    for path, value in _named_ends(file.parent):
        number = type(value) is int and 0 <= value <= LARGEST_ID
        token = library.id_to_token(value) if number else value
        if not isinstance(token, str) or library.token_to_id(token) is None:
            raise UserError(
                f"{path} ends documents with {str(value)[:40]!r}, which is no token of {file.name}; name one that is"
            )
        return token
    for token in END_NAMES:
        if library.token_to_id(token) is not None:
            return token
    raise UserError(
        f"nothing beside {file} says which token ends a document; put a {CONFIG_NAME} there that holds "
        '{"eos_token": "THE TOKEN"}'
    )


def _named_ends(folder: Path) -> Iterator[tuple[Path, Any]]:
    """The files of `folder` that name the end of a sequence, with the token or the id that each names, best first."""
    keys = {SIDECAR_NAME: "end_of_document", CONFIG_NAME: "eos_token", SPECIAL_NAME: "eos_token"}
    keys |= {name: "eos_token_id" for name in ("generation_config.json", "config.json")}
    for name, key in keys.items():
        content = _content_if_there(folder / name)
        value = None if content is None else parse_object(content, folder / name, _ADVICE).get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, list) and value:
            value = value[0]
        if value is not None:
            yield folder / name, value


def _content_if_there(path: Path) -> bytes | None:
    try:
        return read_content(path)
    except FileNotFoundError:
        return None


def _of_library(error: BaseException) -> bool:
    """Whether `tokenizers` raised it: it knows no classes of its own but that of a panic, which Rust makes."""
    return type(error) in (Exception, ValueError) or type(error).__name__ == "PanicException"
