"""A terminal as a person sees it: rows of text that what a program writes has left there."""

from __future__ import annotations

import re

_WORD = re.compile(r"\x1b\[(\d*)([A-Z])|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """Rows by what is written to them; with `reflow` a new width wraps long rows anew, as most terminals do."""

    def __init__(self, columns: int, rows: int, *, reflow: bool = True) -> None:
        self._columns, self._rows, self._reflow = columns, rows, reflow
        self._text, self._row, self._column = [""], 0, 0

    def write(self, shown: str) -> None:
        place = 0
        while place < len(shown):
            word = _WORD.match(shown, place)
            assert word, f"an escape that no panel needs: {shown[place : place + 8]!r}"
            place = word.end()
            count, escape, move, text = word.groups()
            if move == "\r":
                self._column = 0
            elif move == "\n":
                self._down()
            elif escape == "A":
                # No further than what is on the screen: the rest has scrolled away.
                self._row = max(self._row - int(count or 1), len(self._text) - self._rows, 0)
            elif escape in ("K", "J"):
                self._text[self._row] = self._text[self._row][: self._column]
                if escape == "J":
                    del self._text[self._row + 1 :]
            else:
                assert text, f"an escape that no panel needs: {word[0]!r}"
                for character in text:
                    self._put(character)

    def resize(self, columns: int) -> None:
        """The same text in a window of another width."""
        rows, here = list[str](), 0
        for number, row in enumerate(self._text):
            here = len(rows) if number == self._row else here
            parts = [row[i : i + columns] for i in range(0, len(row), columns)] if self._reflow else [row[:columns]]
            rows += parts or [""]
        self._text, self._row, self._columns = rows, here, columns

    @property
    def lines(self) -> list[str]:
        """Every row from the first on, also those that have scrolled away."""
        return [row.rstrip() for row in self._text]

    def _put(self, character: str) -> None:
        if self._column == self._columns:
            self._column = 0
            self._down()
        row = self._text[self._row].ljust(self._column)
        self._text[self._row] = row[: self._column] + character + row[self._column + 1 :]
        self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._text):
            self._text.append("")
