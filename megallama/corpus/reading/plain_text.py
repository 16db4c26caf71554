"""Documents from plain text: one per file, or in a long one, one per stretch that ends at a blank line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megallama.corpus.reading.blocks import BLOCK_BYTES, DocumentError, Reading
from megallama.corpus.reading.lines import BOM, LARGEST_RECORD, Lines
from megallama.system.remote import SourcePath

DOCUMENT_BYTES = 1 << 20


class PlainText:
    """A BlockFile of text. A document ends at the first blank line behind DOCUMENT_BYTES of it, or with its block."""

    def __init__(self, path: SourcePath, reading: Reading) -> None:
        self._lines = Lines(path)
        # A few files of the standard library are in other encodings on purpose.
        self._stops = reading.on_error == "stop" and path.suffix != ".py"
        self._number = 0
        self._blank = -1  # where the last blank line begins that was read

    def close(self) -> None:
        self._lines.close()

    @property
    def file_bytes(self) -> int:
        return self._lines.file_bytes

    def begin(self, number: int) -> bool:
        lines, start = self._lines, number * BLOCK_BYTES
        self._number = number
        lines.skip_to(start)
        while number and self._blank < start and lines.more():
            self._to_next_line(None)
        return lines.position > start or (lines.position == start and lines.more())

    def documents(self, left_out: Counter[str]) -> Iterator[str]:
        while self._blank < (self._number + 1) * BLOCK_BYTES and self._lines.more():
            try:
                yield self._document()
            except DocumentError as error:
                if self._stops:
                    raise
                left_out[error.kind] += 1

    def _document(self) -> str:
        """The next one, up to its last blank line; DocumentError."""
        lines, end = self._lines, (self._number + 1) * BLOCK_BYTES
        text = bytearray()
        begin = lines.position
        too_long = False
        ended = False
        while not ended and lines.more():
            is_blank = self._to_next_line(None if too_long else text)
            size = lines.position - begin
            ended = is_blank and (size > DOCUMENT_BYTES or self._blank >= end)
            too_long = size > LARGEST_RECORD
            if too_long and self._stops:
                break
        if too_long:
            raise DocumentError(
                f"{lines.path} has more than {LARGEST_RECORD >> 20} MiB without a blank line, at which long text is "
                "divided; add some",
                "too long",
            )
        return self._decoded(bytes(text.removeprefix(BOM) if not begin else text))

    def _to_next_line(self, text: bytearray | None) -> bool:
        """Read a line, add it to `text`, and return whether it is blank."""
        begin = self._lines.position
        try:
            line = self._lines.read() or b""
        except DocumentError:  # longer than any document
            return False
        if text is not None:
            text += line
        if is_blank := not line.strip():
            self._blank = begin
        return is_blank

    def _decoded(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            bad = text[error.start : error.end]
            raise DocumentError(
                f"{self._lines.path} is not UTF-8 near {bad!r}; convert it, for example with iconv", "not UTF-8"
            ) from None
