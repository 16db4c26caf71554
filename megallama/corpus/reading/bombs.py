"""Small archives that stand for terabytes without text, told from corpora.

Where a bomb ends a file, all readers of the file have to agree, whatever they pass over. So each of them looks for the
first text in every STRETCH of the content, and for that reads lines that are not of its share.
"""

from __future__ import annotations

from megallama.corpus.reading.blocks import DocumentError
from megallama.corpus.reading.lines import LARGEST_GAP, Lines

LONGEST_GAP = 1_000_000
"""Lines without text that are read, in a row in a block or at the beginning of a stretch. No corpus has as many; a bomb
of a few megabytes has, in any compression, while text that repeats itself may shrink as far."""
STRETCH = LARGEST_GAP


class BombWatch:
    """What the lines that were read say of a compressed file; of another nothing."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._stretch, self._stretch_lines, self._has_text = 0, 0, False

    def limit(self) -> int:
        """How far lines may be passed over; where they stand if the next one has to be read."""
        if not self._lines.compressed:
            return 1 << 63
        begin, end = self._stretch * STRETCH, (self._stretch + 1) * STRETCH
        return end if self._has_text and begin <= self._lines.position < end else self._lines.position

    def read(self, begin: int, has_text: bool) -> None:
        """A line was, which begins at `begin`. A bomb ends the file."""
        lines, stretch = self._lines, begin // STRETCH
        if not lines.compressed:
            return
        is_barren = stretch != self._stretch and not self._has_text
        if stretch != self._stretch:
            self._stretch, self._stretch_lines, self._has_text = stretch, 0, False
        self._has_text |= has_text
        self._stretch_lines += 1
        if is_barren or (self._stretch_lines > LONGEST_GAP and not self._has_text):
            lines.end(DocumentError(f"{lines.path} is refused as a bomb, for want of text at {lines.place}", "bomb"))
