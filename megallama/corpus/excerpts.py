"""The text of a dataset: some of its documents, and how many bytes of it a token holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from megallama.data.indexed import IndexedDataset, Tokens
from megallama.data.info import DatasetInfo
from megallama.errors import UserError
from megallama.text.tokenizer import Tokenizer, load_tokenizer

STRETCHES, STRETCH_TOKENS = 64, 4096


class Compression(NamedTuple):
    """Of a sample of the text; ends of documents apart."""

    text_bytes: int
    tokens: int


def known_tokenizer(prefix: str, info: DatasetInfo | None, spec: str | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a dataset, `spec` if it is named, or None and why there is none.

    UserError if `spec` cannot be loaded, or is not that of the dataset.
    """
    if spec is not None:
        tokenizer = load_tokenizer(spec)
        if info and tokenizer.fingerprint != info.fingerprint:
            raise UserError(
                f"--tokenizer {spec} is not the tokenizer of the dataset {prefix}; "
                f"name {info.tokenizer} or leave it out"
            )
        return tokenizer, ""
    if info is None:
        return None, "the dataset does not say by which tokenizer it was made; name it with --tokenizer SPEC"
    try:
        tokenizer = load_tokenizer(info.tokenizer)
    except UserError as error:
        return None, f"its tokenizer cannot be loaded ({error}); name it with --tokenizer SPEC"
    if tokenizer.fingerprint != info.fingerprint:
        return None, f"{info.tokenizer} is another tokenizer now; name that of the dataset with --tokenizer SPEC"
    return tokenizer, ""


def compression(dataset: IndexedDataset, tokenizer: Tokenizer) -> Compression:
    """Of stretches evenly over the dataset, or of all documents where that is no more; UserError for unknown ids."""
    text_bytes, count = 0, 0
    for ids in _stretches(dataset):
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= tokenizer.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise UserError(
                f"the dataset {dataset.prefix} holds the id {wrong} and the tokenizer has ids 0 to "
                f"{tokenizer.vocab_size - 1}; name that of the dataset with --tokenizer SPEC"
            )
        text = ids[ids != tokenizer.eod_id]
        text_bytes, count = text_bytes + len(tokenizer.decode(text.tolist()).encode()), count + len(text)
    return Compression(text_bytes, count)


def _stretches(dataset: IndexedDataset) -> Iterator[Tokens]:
    count = len(dataset.tokens)
    if count <= STRETCHES * STRETCH_TOKENS:
        yield from (ids for number in range(dataset.num_documents) if len(ids := dataset.document(number)))
        return
    for start in np.linspace(0, count - STRETCH_TOKENS, STRETCHES, dtype=np.int64).tolist():
        yield dataset.tokens[start : start + STRETCH_TOKENS]


def first_and_last(count: int, documents: int) -> list[int]:
    """Numbers of `count` of the documents: the first half, and the last; all where there are no more."""
    count = min(count, documents)
    last = count // 2
    return [*range(count - last), *range(documents - last, documents)]
