"""What is evaluated: documents as ids, and how many bytes of text each stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from megallama.corpus.reading.corpora import iterate_documents
from megallama.data.dataset import TokenDataset
from megallama.data.indexed import bin_path, idx_path
from megallama.data.node_cache import is_remote_dataset
from megallama.errors import UserError
from megallama.text.surrogates import without_surrogates
from megallama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """A document."""

    ids: list[int]
    """Without its end."""
    bytes: int
    """Of its text in UTF-8."""


def read_texts(data: str, tokenizer: Tokenizer, text_field: str = "text") -> Iterator[Text]:
    """The documents of `data`: the prefix of a dataset, else what `data build` reads. UserError as it is met.

    The bytes of a dataset are those of its tokens, decoded.
    """
    if bin_path(data).is_file() or idx_path(data).is_file() or is_remote_dataset(data):
        return _of_dataset(data, tokenizer)
    if data.endswith((".bin", ".idx")) and Path(data).is_file():
        raise UserError(f"{data} is a file of a dataset; name its prefix, {data[:-4]}")
    return _of_text(data, tokenizer, text_field)


def _of_text(data: str, tokenizer: Tokenizer, text_field: str) -> Iterator[Text]:
    for document in iterate_documents([data], text_field):
        yield Text(tokenizer.encode(document), len(without_surrogates(document).encode()))


def _of_dataset(data: str, tokenizer: Tokenizer) -> Iterator[Text]:
    dataset = TokenDataset(data)
    if dataset.info and dataset.info.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{data} was built with the tokenizer {dataset.info.tokenizer}, which is not the model's; build it with "
            "the model's, or give the text itself"
        )
    for number in range(dataset.indexed.num_documents):
        row = dataset.indexed.document(number)
        unknown = row[(row < 0) | (row >= tokenizer.vocab_size)]
        if unknown.size:
            raise UserError(
                f"{data} holds the id {unknown[0]}, and the model's tokenizer has the ids 0 to "
                f"{tokenizer.vocab_size - 1}; build it with the model's, or give the text itself"
            )
        # Datasets made elsewhere may have several documents in a row.
        for piece in np.split(row, np.flatnonzero(row == tokenizer.eod_id)):
            ids = piece[piece != tokenizer.eod_id].tolist()
            yield Text(ids, len(tokenizer.decode(ids).encode()))


def some(texts: Iterator[Text], limit: int | None, data: str) -> Iterator[Text]:
    """The first `limit` documents that have tokens. UserError where there is none."""
    found = islice((text for text in texts if text.ids), limit)
    first = next(found, None)
    if first is None:
        raise UserError(f"{data} has no text; name a file, a folder or a dataset that has some")
    return chain([first], found)
