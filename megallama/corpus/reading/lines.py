"""The lines of a file from any position in its content, in bounded memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from megallama.corpus.reading.blocks import DocumentError
from megallama.corpus.reading.decompress import CHUNK, gzip_chunks, zstd_chunks
from megallama.errors import UserError
from megallama.system.remote import SourcePath, open_source_file

BOM = b"\xef\xbb\xbf"
LARGEST_RECORD = 64 << 20
"""Bytes of a line, or of a document, at most."""
LARGEST_GAP = 1 << 30
"""Bytes of compressed content in a row without a document that are read."""


class Lines:
    """A position in the content of a file that moves forward, from the beginning of a line to that of another.

    A plain file is sought. A compressed one is decompressed as a whole, and what is skipped is searched for line ends
    only. Methods raise UserError where the system cannot read the file. Damage ends its content.
    """

    def __init__(self, path: SourcePath) -> None:
        self.path = path
        self.position = 0
        """Where the next line begins, in bytes of content; behind damage, where the damage is."""
        self.number: int | None = 1
        """Of the next line, from 1; None if bytes were left out unread."""
        self.damage: DocumentError | None = None
        """What is wrong with the file at `position`, behind which nothing is read."""
        with refusals_named(path):
            self._file = open_source_file(path)
        self.compressed = path.suffix in (".gz", ".zst")
        self._chunks = self._read_chunks()
        self._chunk, self._at = b"", 0
        self._line_begin = 0

    def close(self) -> None:
        self._file.close()

    @property
    def file_bytes(self) -> int:
        """Where the file stands."""
        return self._file.tell()

    @property
    def place(self) -> str:
        """The next line, for the user to find it."""
        return f"{self.path}:{self.number}" if self.number else f"{self.path}, at byte {self.position:,},"

    def more(self) -> bool:
        """Whether there is another byte."""
        return self._at < len(self._chunk) or self._fill()

    def read(self) -> bytes | None:
        """The next line with its end, or None. DocumentError if it has more than LARGEST_RECORD bytes."""
        end = self._chunk.find(b"\n", self._at) + 1
        if end:
            line = self._chunk[self._at : end]
            self._at = end
            self.position = self._line_begin = self.position + len(line)
            self.number = self.number and self.number + 1
            return line
        return self._read_across_chunks()

    def skip_to(self, target: int) -> None:
        """To the first line that begins at `target` or behind it, or to the end of the content."""
        if self.position >= target:
            return
        if self.compressed:
            self._skip_bytes(target - 1 - self.position)
        else:
            self._seek(target - 1)
        self.skip_line()  # a line begins at the target if the byte before it ends one

    def skip_line(self) -> None:
        """To the next line, without holding this one in memory."""
        while self.more():
            end = self._chunk.find(b"\n", self._at) + 1
            self._pass((end or len(self._chunk)) - self._at)
            if end:
                return

    def end(self, damage: DocumentError) -> None:
        """Read nothing any more."""
        self.damage = damage
        self._chunk, self._at, self._chunks = b"", 0, iter(())

    def _read_across_chunks(self) -> bytes | None:
        place, line, end = self.place, bytearray(), 0
        while not end and self.more():
            end = self._chunk.find(b"\n", self._at) + 1
            piece = self._chunk[self._at : end or len(self._chunk)]
            self._pass(len(piece))
            line += piece  # not a list of pieces: what those leave behind is not given back to the system
            if len(line) > LARGEST_RECORD:
                line.clear()
                if not end:
                    self.skip_line()
                raise DocumentError(f"{place} has a line of more than {LARGEST_RECORD >> 20} MiB; split it", "too long")
        if self.damage or not line:
            return None  # what stands before damage is no whole line
        return bytes(line)

    def _pass(self, size: int) -> None:
        """Leave that much of the chunk behind."""
        begin, end = self._at, self._at + size
        first_end = self._chunk.find(b"\n", begin, end) + 1 or end
        if self.compressed and self.position + first_end - begin - self._line_begin > LARGEST_GAP:
            self.position = self._line_begin + LARGEST_GAP  # for every reader the same one
            self.end(
                DocumentError(
                    f"{self.path} has a line of {LARGEST_GAP:,} bytes: refused as a bomb; take it out", "bomb"
                )
            )
            return
        lines = self._chunk.count(b"\n", begin, end)
        if lines:
            self.number = self.number and self.number + lines
            self._line_begin = self.position + self._chunk.rfind(b"\n", begin, end) + 1 - begin
        self._at = end
        self.position += size

    def _seek(self, target: int) -> None:
        with refusals_named(self.path):
            self._file.seek(0, io.SEEK_END)
            self.position = min(target, self._file.tell())
            self._file.seek(self.position)
        self._chunk, self._at, self.number = b"", 0, None

    def _skip_bytes(self, count: int) -> None:
        while count and self.more():
            size = min(count, len(self._chunk) - self._at)
            self._pass(size)
            count -= size

    def _fill(self) -> bool:
        """Whether another chunk stands in the place of the one that was read."""
        self._chunk, self._at = next(self._chunks, b""), 0
        return bool(self._chunk)

    def _read_chunks(self) -> Iterator[bytes]:
        """Chunks that are not empty; plain ones from where the file stands."""
        with refusals_named(self.path):
            try:
                yield from filter(None, self._contents(self._file))
            except DocumentError as error:
                self.end(error)

    def _contents(self, file: BinaryIO) -> Iterator[bytes]:
        if self.path.suffix == ".zst":
            return zstd_chunks(file, self.path)
        if self.path.suffix == ".gz":
            return gzip_chunks(file, self.path)
        return iter(lambda: file.read(CHUNK), b"")


@contextmanager
def refusals_named(place: str | SourcePath) -> Iterator[None]:
    """An OSError of the block becomes a UserError that names `place`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror}); mend that or name another source") from None
