"""Small archives that stand for terabytes without text, told from corpora.

Where a bomb ends a file, all readers of the file have to agree, whatever they pass over. So each of them looks for the
first text in every STRETCH of the content, and for that reads lines that are not of its share.
"""

from __future__ import annotations

from megallama.corpus.reading.blocks import DocumentError
from megallama.corpus.reading.lines import LARGEST_GAP, Lines
from megallama.errors import UserError

LONGEST_GAP = 1_000_000
"""Lines in a row without text that are read. No corpus has as many, nor LARGEST_GAP bytes of them; a bomb of a few
megabytes has, in any compression, while text that repeats itself may shrink as far."""
STRETCH = LARGEST_GAP


class BombWatch:
    """What the lines that were read say of their file."""

    def __init__(self, lines: Lines, *, stops: bool) -> None:
        self._lines = lines
        self._stops = stops
        self._stretch, self._stretch_lines, self._has_text = 0, 0, False
        self._gap_lines, self._gap_begin = 0, 0

    def limit(self) -> int:
        """How far lines may be passed over; where they stand if the next one has to be read."""
        if not self._lines.compressed:
            return 1 << 63
        begin, end = self._stretch * STRETCH, (self._stretch + 1) * STRETCH
        return end if self._has_text and begin <= self._lines.position < end else self._lines.position

    def passed_over(self) -> None:
        """Lines were, of which nothing is known."""
        self._gap_lines, self._gap_begin = 0, self._lines.position

    def read(self, begin: int, has_text: bool) -> None:
        """A line was, which begins at `begin`. A bomb ends the file; UserError with `stops`."""
        if self._lines.compressed:
            self._watch_stretch(begin // STRETCH, has_text)
        if self._stops:
            self._watch_gap(has_text)

    def _watch_stretch(self, stretch: int, has_text: bool) -> None:
        is_barren = stretch != self._stretch and not self._has_text
        if stretch != self._stretch:
            self._stretch, self._stretch_lines, self._has_text = stretch, 0, False
        self._has_text |= has_text
        self._stretch_lines += 1
        if is_barren or (self._stretch_lines > LONGEST_GAP and not self._has_text):
            lines = self._lines
            lines.end(DocumentError(f"{lines.path} is refused as a bomb, for want of text at {lines.place}", "bomb"))

    def _watch_gap(self, has_text: bool) -> None:
        lines = self._lines
        if has_text:
            self._gap_lines, self._gap_begin = 0, lines.position
            return
        self._gap_lines += 1
        gap = lines.position - self._gap_begin
        if self._gap_lines > LONGEST_GAP or gap > LARGEST_GAP:
            last = f" after line {lines.number - 1 - self._gap_lines}" if lines.number else ""
            raise UserError(
                f"{lines.path} has {self._gap_lines:,} lines of {gap:,} bytes in a row without text{last}: "
                "refused as a bomb; take them out"
            )
