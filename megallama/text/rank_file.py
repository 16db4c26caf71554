"""Rank files, tiktoken's own format: one line `base64(token bytes) rank` per token."""

from __future__ import annotations

import binascii
from pathlib import Path

from megallama.errors import UserError
from megallama.text.tokenizer_files import read_content


def read_rank_file(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, of a rank file that stands alone: its ranks are 0, 1, 2, ... UserError if they are not."""
    ranks = read_ranks(path)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{path} is no complete tiktoken rank file: its {len(ranks)} ranks must be 0 to {len(ranks) - 1}"
        )
    return ranks


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank. Not tiktoken's own reader: that caches by path and gives the old ranks of a changed file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_content(path).splitlines(), start=1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token = binascii.a2b_base64(encoded, strict_mode=True)
            if ranks.setdefault(token, int(rank)) != int(rank):
                raise ValueError("a second rank of one token")
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}:{number} is no `base64 rank` line of a tiktoken rank file: {line[:40]!r}"
            ) from None
    if missing := sum(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path} is no complete tiktoken rank file: {missing} of the 256 single bytes are missing")
    return ranks


def rank_lines(ranks: dict[bytes, int]) -> bytes:
    """The content of a tiktoken rank file, in order of rank."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(binascii.b2a_base64(token, newline=False) + b" %d\n" % rank for token, rank in ordered)
