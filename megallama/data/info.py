"""What PREFIX.json says of a dataset that was built here, and whether it is that of the two files beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megallama.data.indexed import IndexedDataset, open_indexed, token_dtype
from megallama.data.node_cache import on_this_node
from megallama.errors import UserError
from megallama.system.regular_file import read_regular
from megallama.text.tokenizer_files import LARGEST_ID

LARGEST_INFO = 512 << 20
"""It names every file of the sources."""


@dataclass(frozen=True)
class DatasetInfo:
    """The content of PREFIX.json."""

    tokenizer: str
    """As it was named to the build."""
    fingerprint: str
    """The fingerprint of the tokenizer."""
    vocab_size: int
    eod_id: int
    documents: int
    tokens: int
    """Ends of documents included."""
    sources: list[dict[str, Any]]
    inputs: str
    """Hash over everything that determines the dataset."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Documents that are not in the dataset, by the kind of the reason."""
    rules: dict[str, Any] = field(default_factory=dict)
    """By which documents were found and left out."""


def info_path(prefix: str) -> Path:
    """Where the description of the dataset `prefix` is."""
    return Path(f"{prefix}.json")


def read_info(prefix: str) -> DatasetInfo | None:
    """The description of a dataset; None beside a dataset made elsewhere, UserError if it is damaged."""
    path = info_path(prefix)
    try:
        info = DatasetInfo(**json.loads(read_regular(path, LARGEST_INFO)))
        _check_values(info)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that, or build the dataset again") from None
    except RecursionError:
        raise UserError(f"{path} is damaged (nested too deeply); build the dataset again") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); build the dataset again") from None
    return info


def open_described(prefix: str) -> tuple[IndexedDataset, DatasetInfo | None]:
    """A dataset and its description; UserError if one cannot be read, or if they are not of one build.

    A dataset behind a URL is first copied to this node.
    """
    local = on_this_node(prefix)
    try:
        return _open_described(local)
    except UserError as error:
        raise error if local == prefix else UserError(f"{prefix}, in its copy on this node: {error}") from None


def _open_described(prefix: str) -> tuple[IndexedDataset, DatasetInfo | None]:
    indexed, info = open_indexed(prefix), read_info(prefix)
    if info is None:
        return indexed, None
    dtype = token_dtype(info.vocab_size)
    says = f"{info.documents:,} documents of {info.tokens:,} tokens of type {dtype.name}"
    found = f"{indexed.num_documents:,} of {len(indexed.tokens):,} of type {indexed.tokens.dtype.name}"
    if (info.documents, info.tokens, dtype) != (indexed.num_documents, len(indexed.tokens), indexed.tokens.dtype):
        raise UserError(
            f"{info_path(prefix)} is of another build than the index beside it: it says {says}, the index has {found}; "
            "build the dataset again"
        )
    return indexed, info


def _check_values(info: DatasetInfo) -> None:
    """ValueError for a value that no build writes."""
    for name in ("tokenizer", "fingerprint", "inputs"):
        if not isinstance(getattr(info, name), str):
            raise ValueError(f"{name} is no string")
    for name, end in (("vocab_size", LARGEST_ID + 2), ("documents", 1 << 63), ("tokens", 1 << 63)):
        value = getattr(info, name)
        if type(value) is not int or not 0 < value < end:
            raise ValueError(f"{name} is no number from 1 to {end - 1}")
    if type(info.eod_id) is not int or not 0 <= info.eod_id < info.vocab_size:
        raise ValueError(f"eod_id is no number below the vocab_size {info.vocab_size}")
    if not isinstance(info.sources, list) or not all(isinstance(source, dict) for source in info.sources):
        raise ValueError("sources is no list of objects")
    if not isinstance(info.rules, dict) or not isinstance(info.left_out, dict):
        raise ValueError("rules or left_out is no object")
    if not all(type(count) is int and count >= 0 for count in info.left_out.values()):
        raise ValueError("left_out counts no documents")
