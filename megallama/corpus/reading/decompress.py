"""Compressed files as chunks of their content, in bounded memory whatever the content.

gzip: RFC 1952. zstd: RFC 8878; frames and blocks are found here, because libzstd expands all that it is given, and four
bytes can stand for 128 KiB, and because a file that is cut short has to be told from one that ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from megallama.corpus.reading.blocks import DocumentError
from megallama.system.remote import SourcePath

CHUNK = 1 << 20
"""Bytes that one chunk holds at most."""
LARGEST_WINDOW_LOG = 27
GZIP_INPUT = 64 << 10
LARGEST_ZSTD_BLOCK = 128 << 10
ZSTD_MAGIC = 0xFD2FB528
ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)


def gzip_chunks(file: BinaryIO, path: SourcePath) -> Iterator[bytes]:
    """The content of all members of a gzip file; DocumentError behind the last chunk that can be read."""
    member = None
    rest = b""
    while rest or (rest := file.read(GZIP_INPUT)):
        if member is None:
            rest = rest.lstrip(b"\0")  # padding between members, as tapes have it
            if not rest:
                continue
            member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            chunk = member.decompress(rest, CHUNK)
        except zlib.error as error:
            raise _damage(path, str(error)) from None
        if chunk:
            yield chunk
        rest = member.unconsumed_tail
        if member.eof:
            rest, member = member.unused_data, None
    if member is not None:
        raise _damage(path, "the last gzip member has no end")


def zstd_chunks(file: BinaryIO, path: SourcePath) -> Iterator[bytes]:
    """The content of all frames of a zstd file; DocumentError behind the last chunk that can be read.

    A window, which is held in memory, has at most 2**LARGEST_WINDOW_LOG bytes.
    """
    try:
        yield from _zstd_chunks(file, path)
    except (EOFError, zstandard.ZstdError) as error:
        raise _damage(path, str(error)) from None


def _damage(path: SourcePath, what: str) -> DocumentError:
    return DocumentError(f"{path} is damaged or cut short: {what}", "damaged stream")


def _zstd_chunks(file: BinaryIO, path: SourcePath) -> Iterator[bytes]:
    while magic := file.read(4):
        number = int.from_bytes(magic, "little")
        if number in ZSTD_SKIPPABLE:
            size = int.from_bytes(_exactly(file, 4), "little")
            while size:
                size -= len(_exactly(file, min(size, CHUNK)))
        elif number == ZSTD_MAGIC:
            yield from _frame_chunks(file, magic, path)
        else:
            raise zstandard.ZstdError(f"no zstd frame begins with {magic!r}")


def _frame_chunks(file: BinaryIO, magic: bytes, path: SourcePath) -> Iterator[bytes]:
    header, window, has_checksum = _frame_header(file)
    if window > 1 << LARGEST_WINDOW_LOG:
        raise DocumentError(
            f"{path} needs a window of {window >> 20:,} MiB to be read, and {1 << LARGEST_WINDOW_LOG - 20} MiB is the "
            f"most that is; compress it again with a smaller one: zstd --long={LARGEST_WINDOW_LOG}",
            "long window",
        )
    frame = zstandard.ZstdDecompressor(max_window_size=1 << LARGEST_WINDOW_LOG).decompressobj()
    blocks = [magic + header]
    last = False
    try:
        while not last:
            last, block = _block(file)
            blocks.append(block)
            if last and has_checksum:
                blocks.append(_exactly(file, 4))
            if last or len(blocks) * LARGEST_ZSTD_BLOCK >= CHUNK:
                blocks, whole = [], b"".join(blocks)
                yield frame.decompress(whole)
    except EOFError:
        yield frame.decompress(b"".join(blocks))  # those before the end of the file are whole
        raise


def _frame_header(file: BinaryIO) -> tuple[bytes, int, bool]:
    """The bytes of a frame's header behind the magic number, the bytes of its window, whether a checksum ends it."""
    header = _exactly(file, 1)
    content_flag, single_segment, dictionary_flag = header[0] >> 6, header[0] >> 5 & 1, header[0] & 3
    content_width = (single_segment, 2, 4, 8)[content_flag]
    fields = _exactly(file, (1 - single_segment) + (0, 1, 2, 4)[dictionary_flag] + content_width)
    if single_segment:
        window = int.from_bytes(fields[len(fields) - content_width :], "little")
    else:
        base = 1 << (10 + (fields[0] >> 3))
        window = base + (base >> 3) * (fields[0] & 7)
    return header + fields, window, bool(header[0] & 4)


def _block(file: BinaryIO) -> tuple[bool, bytes]:
    """Whether it is the last block of its frame, and the block with its header."""
    header = _exactly(file, 3)
    number = int.from_bytes(header, "little")
    kind, size = number >> 1 & 3, number >> 3
    if kind == 3 or size > LARGEST_ZSTD_BLOCK:
        raise zstandard.ZstdError("a zstd block has a header that is none")
    return bool(number & 1), header + _exactly(file, 1 if kind == 1 else size)  # kind 1: one byte, repeated


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise EOFError("the last zstd frame has no end")
    return content
